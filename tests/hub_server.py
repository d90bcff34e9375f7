"""A stand-in for huggingface.co: serves folders as repositories, to the real clients.

python tests/hub_server.py ROOT    serves ROOT, prints its port

ROOT/<owner>/<name>/<revision>/<file> is a model, ROOT/datasets/<owner>/<name>/<revision>/<file> a
data set; a slash in a revision is written %2F, as in the URLs.
"""

import hashlib
import json
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

ABOUT = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(/revision/([^/]+))?")
TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(tree|paths-info)/([^/]+)(/(.+))?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Asked(NamedTuple):
    method: str
    path: str  # without its query
    bytes: int  # of the answer's body


class Handler(BaseHTTPRequestHandler):
    root: Path
    asked: list[Asked]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a header and a body would wait for each other

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path, _, query = self.path.partition("?")
        if about := ABOUT.fullmatch(path):
            kind, repo, _, revision = about.groups()
            return self.describe(kind, repo, revision or "main")
        if tree := TREE.fullmatch(path):
            kind, repo, what, revision, _, inside = tree.groups()
            if what == "tree":
                recursive = parse_qs(query).get("recursive", ["False"])[0].lower() == "true"
                return self.tree(kind, repo, revision, unquote(inside or ""), recursive)
            asked = json.loads(body) if body.startswith("{") else parse_qs(body)
            return self.paths_info(kind, repo, revision, asked["paths"])
        if match := RESOLVE.fullmatch(path):
            prefix, repo, revision, name = match.groups()
            return self.file("datasets" if prefix else "models", repo, revision, unquote(name))
        return self.fail("EntryNotFound")

    def folder(self, kind: str, repo: str, revision: str) -> Path | None:
        """Of a revision, by name or commit; None after the refusal was sent."""
        repository = self.root / ("datasets" if kind == "datasets" else ".") / repo
        if not repository.is_dir():
            return self.fail("RepoNotFound")
        by_name = {path.name: path for path in repository.iterdir()}
        by_name |= {commit(repo, name): path for name, path in by_name.items()}
        revision = revision.replace("/", "%2F")
        return by_name[revision] if revision in by_name else self.fail("RevisionNotFound")

    def file(self, kind: str, repo: str, revision: str, name: str):
        folder = self.folder(kind, repo, revision)
        if folder is None:
            return
        found = {"X-Repo-Commit": commit(repo, folder.name)}
        if not (folder / name).is_file():
            return self.fail("EntryNotFound", found)
        data = (folder / name).read_bytes()
        found |= {"ETag": f'"{digest(data)}"', "Accept-Ranges": "bytes"}
        wanted = RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted is None:
            return self.send(200, data, found)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        found["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(206, data[first : last + 1], found)

    def describe(self, kind: str, repo: str, revision: str):
        folder = self.folder(kind, repo, revision)
        if folder is None:
            return
        files = [{"rfilename": path.relative_to(folder).as_posix()} for path in inside(folder)]
        self.send_json({"id": repo, "sha": commit(repo, folder.name), "siblings": files})

    def tree(self, kind: str, repo: str, revision: str, below: str, recursive: bool):
        folder = self.folder(kind, repo, revision)
        if folder is None:
            return
        if not (folder / below).is_dir():
            return self.fail("EntryNotFound")
        paths = inside(folder / below, folders=True)
        if not recursive:
            paths = [path for path in paths if path.parent == folder / below]
        self.send_json([entry(folder, path) for path in paths])

    def paths_info(self, kind: str, repo: str, revision: str, names: list[str]):
        folder = self.folder(kind, repo, revision)
        if folder is not None:
            paths = [folder / name for name in names]
            self.send_json([entry(folder, path) for path in paths if path.exists()])

    def send_json(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, code: str, headers: dict | None = None):
        self.send(404, b"", {"X-Error-Code": code} | (headers or {}))

    def send(self, status: int, data: bytes, headers: dict):
        sent = len(data) if self.command != "HEAD" else 0
        self.asked.append(Asked(self.command, self.path.partition("?")[0], sent))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def inside(folder: Path, *, folders: bool = False) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if folders or path.is_file())


def entry(folder: Path, path: Path) -> dict:
    """A file or folder as the hub describes it."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": digest(name.encode())[:40], "size": 0}
    data = path.read_bytes()
    return {"type": "file", "path": name, "oid": digest(data)[:40], "size": len(data)}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def commit(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


def server(root: str | Path) -> ThreadingHTTPServer:
    handler = type("Handler", (Handler,), {"root": Path(root), "asked": []})
    return ThreadingHTTPServer(("127.0.0.1", 0), handler)


@contextmanager
def serving(root: Path):
    """(address, what was asked) of a stand-in in a thread of this process."""
    stand_in = server(root)
    thread = threading.Thread(target=stand_in.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        handler = stand_in.RequestHandlerClass
        yield f"http://127.0.0.1:{stand_in.server_port}", handler.asked
    finally:
        stand_in.shutdown()
        stand_in.server_close()
        thread.join()


if __name__ == "__main__":
    stand_in = server(sys.argv[1])
    print(stand_in.server_port, flush=True)
    stand_in.serve_forever()
