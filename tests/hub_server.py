"""A stand-in for huggingface.co: serves folders under model ids, to the real client.

python tests/hub_server.py ROOT    serves ROOT/<owner>/<name>/<revision>/<file>, prints its port
"""

import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = re.compile(r"/api/models/([^/]+/[^/]+)(/revision/([^/]+))?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Handler(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body: bool):
        path = self.path.partition("?")[0]
        if about := MODEL.fullmatch(path):
            return self.describe(about[1], about[3] or "main")
        match = RESOLVE.fullmatch(path)
        if match is None:
            return self.fail("EntryNotFound")
        repo, revision, name = match.groups()
        if not (self.root / repo).is_dir():
            return self.fail("RepoNotFound")
        folder = self.root / repo / revision
        if not folder.is_dir():  # the client asks again by commit
            by_commit = {commit(repo, p.name): p for p in (self.root / repo).iterdir()}
            if revision not in by_commit:
                return self.fail("RevisionNotFound")
            folder = by_commit[revision]
        if not (folder / name).is_file():
            return self.fail("EntryNotFound", commit(repo, folder.name))
        data = (folder / name).read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit(repo, folder.name))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)
        return None

    def describe(self, repo: str, revision: str):
        folder = self.root / repo / revision
        if not folder.is_dir():
            return self.fail("RevisionNotFound" if folder.parent.is_dir() else "RepoNotFound")
        files = [{"rfilename": path.name} for path in folder.iterdir()]
        about = {"id": repo, "sha": commit(repo, revision), "siblings": files}
        data = json.dumps(about).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def fail(self, code: str, found: str | None = None):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        if found:
            self.send_header("X-Repo-Commit", found)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


def commit(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


def serve(root: str) -> None:
    handler = type("Handler", (Handler,), {"root": Path(root)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1])
