"""Data sets on the Hugging Face hub: which files hold a split, and reading those alone.

`datasets` says which files of a revision belong to which split (its rules, and the repository's
card). Only files that are read are downloaded, one after the other, into the cache; never those of
another split. Where only the end of a split is read, the footers of the parquet files tell which
files hold it. Footers are read by range requests.

Only huggingface_hub talks to the hub, so its own settings hold (HF_ENDPOINT, HF_TOKEN, and
HF_HUB_OFFLINE). The list of files is kept beside the downloads: without a network, downloaded
files can still be read.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data import tables
from data.arrow import parquet
from data.arrow.thrift import Damaged
from data.hub_errors import CONNECT_SECONDS, HubUnreachable, hub_errors
from data.readers import Piece
from data.tables import Part
from utils import digest, first_line, read_json, write_json

log = logging.getLogger("bamdlm")

CONVERTED = "refs/convert/parquet"  # the hub's own conversion of repositories that held a script
KINDS = (".parquet", ".jsonl")
# In a file's name, what tells the files of one table apart.
SHARD = re.compile(r"(-\d{5}-of-\d{5}(-[0-9a-f]{16})?|\d+)(?=\.\w+$)")
ABSENT = ": no such data set on the hub, or a private one"


@dataclass(frozen=True)
class Hub:
    """A configuration of a repository at a revision: by its name, or by the folder it lies in."""

    repo: str
    name: str | None = None
    data_dir: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        where = self.name or self.data_dir
        return self.repo + (f" ({where})" if where else "") + f" at {self.revision or 'main'}"

    def identity(self, split: str, revision: str | None) -> dict:
        return asdict(self) | {"revision": revision or self.revision, "split": split}

    def parts(
        self, split: str, revision: str | None, cache: Path, *, download: bool = True
    ) -> list[Part]:
        """The files of a split, in order. OSError: it cannot be had from the hub now.

        cache: where downloads are kept. With download=False files are read over the network and not
        kept (parquet only).
        """
        from huggingface_hub import constants

        table = replace(self, revision=revision or self.revision)
        key = json.dumps([asdict(table), split], sort_keys=True)
        listings = cache / "downloads" / "listings"
        note = listings / f"{self.repo.replace('/', '--')}-{digest(key, 12)}.json"
        if not constants.is_offline_mode():
            try:
                write_json(note, _ask(table, split, cache))
            except HubUnreachable as error:
                if not note.is_file():
                    raise
                log.warning("%s; using what was downloaded before", error)
        elif not note.is_file():
            raise OSError(f"{table}, {split}: HF_HUB_OFFLINE is set, and it was not read before")
        found = read_json(note)
        return [_part(self.repo, found["commit"], name, cache, download) for name in found["files"]]


def _ask(table: Hub, split: str, cache: Path) -> dict:
    """{"table", "split", "commit", "files": names in the repository}."""
    import datasets
    from huggingface_hub import HfApi

    with hub_errors(str(table), absent=ABSENT):
        info = HfApi().dataset_info(table.repo, revision=table.revision, timeout=CONNECT_SECONDS)
        try:
            builder = datasets.load_dataset_builder(
                table.repo,
                table.name,
                data_dir=table.data_dir,
                revision=info.sha,
                cache_dir=str(cache / "downloads"),
            )
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise OSError(f"{table}: {first_line(error)}") from error
    splits = {str(key): list(files) for key, files in builder.config.data_files.items()}
    if split not in splits:
        raise OSError(f"{table} has no split {split}, only {', '.join(splits)}")
    prefix = f"hf://datasets/{table.repo}@{info.sha}/"
    names = [address.removeprefix(prefix) for address in splits[split]]
    _check_files(table, split, names)
    return {"table": asdict(table), "split": split, "commit": info.sha, "files": names}


def _check_files(table: Hub, split: str, names: list[str]) -> None:
    """Refuse files that are not all of one table, or of no known kind."""
    if len({SHARD.sub("", name) for name in names}) > 1:
        some = ", ".join(names[:4])
        raise OSError(f"{table}: the files of {split} are of several tables ({some})")
    for name in names:
        if f"partial-{split}" in name:
            raise OSError(f"{table}: the hub has converted only the first part of {split} ({name})")
        if not name.endswith(KINDS):
            raise OSError(f"{table}: {name} is none of {', '.join(KINDS)}")


def _part(repo: str, commit: str, name: str, cache: Path, download: bool) -> Part:
    from huggingface_hub import HfFileSystem, hf_hub_download, try_to_load_from_cache

    place = f"{repo}@{commit[:8]}, {name}"
    address = f"hf://datasets/{repo}@{commit}/{name}"
    kept = {"repo_id": repo, "filename": name, "repo_type": "dataset", "revision": commit}
    kept["cache_dir"] = str(cache / "downloads")
    reader = tables.READERS[Path(name).suffix]

    def read(column: str) -> Iterator[Piece]:
        """From the cache, downloaded if need be."""
        with _reading(place):
            path = Path(hf_hub_download(**kept))
        return reader(path, column)

    def streamed(column: str) -> Iterator[Piece]:
        with (
            _reading(place),
            HfFileSystem().open(address, "rb", cache_type="blockcache") as file,
        ):
            yield from parquet.parquet_rows(file, column, place)

    def count() -> int:
        """From the footer: of the file if it is there, else over the network."""
        path = try_to_load_from_cache(**kept)
        if isinstance(path, str):
            return parquet.count_parquet(Path(path))
        with _reading(place), HfFileSystem().open(address, "rb", cache_type="none") as file:
            return parquet.checked_footer(file).num_rows

    if not name.endswith(".parquet"):
        return Part(place, 1, read)
    return Part(place, 1, read if download else streamed, count)


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """While a file on the hub is read. ValueError: it is damaged. OSError: the connection."""
    import pyarrow

    try:
        with hub_errors(f"{place} could not be read from the hub", absent=ABSENT):
            yield
    except (Damaged, pyarrow.ArrowInvalid) as error:
        raise ValueError(parquet.broken_parquet(place, error)) from error
    except HubUnreachable as error:
        raise OSError(
            f"{error}; run it again (whole files are kept), or give a local copy with"
            " data.source=PATH"
        ) from error
