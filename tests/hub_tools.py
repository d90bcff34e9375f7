"""Repositories of data sets for the stand-in hub, clients that ask it, and the rows of a split."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hub_server import serving

from data import corpora
from data.preparation import prepare
from data.readers import Piece
from data.remote_cache import open_cache
from data.split import Split
from data.tables import Part
from data.token_rows import TokenRows
from settings.defaults import user_cache


def get_rows(
    corpus: str, split: str, *, cache_dir: str | Path, processes: int = 1, **settings
) -> TokenRows:
    """The rows of one split, prepared at the first call; cache_dir and processes: as in
    preparation.prepare; settings: of split.Split."""
    return prepare(Split(corpus, split, **settings), open_cache(cache_dir, user_cache()), processes)


def put_table(root, repo, revision, name, columns):
    """A parquet file of a repository below the stand-in's root."""
    path = root / "datasets" / repo / revision.replace("/", "%2F") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def hold_out(monkeypatch, documents):
    """Make so many of OpenWebText's last documents its validation split."""
    rows = {
        "openwebtext-train": {"train": f"train[:-{documents}]"},
        "openwebtext-valid": {"valid": f"train[-{documents}:]"},
    }
    for name, split in rows.items():
        monkeypatch.setitem(corpora.CORPORA, name, replace(corpora.CORPORA[name], **split))


def in_memory(columns):
    """A part that has nothing behind it."""

    def read(column):
        for i, text in enumerate(columns[column]):
            yield Piece(text, True, (i + 1) / len(columns[column]))

    return Part("in memory", 1, read)


def texts(pieces):
    """Documents whole."""
    documents, open_parts = [], []
    for piece in pieces:
        open_parts.append(piece.text)
        if piece.ends:
            documents.append("".join(open_parts))
            open_parts = []
    assert not open_parts
    return documents


class StandIn:
    """root: to be filled; asked: every request so far."""

    def __init__(self, root, address, asked):
        self.root, self.address, self.asked = root, address, asked

    def files(self):
        """Names of the files that were read, in whole or in part."""
        return {
            request.path.rpartition("/")[2]
            for request in self.asked
            if request.method == "GET" and "/resolve/" in request.path and request.bytes
        }

    def bytes_of(self, name):
        return sum(r.bytes for r in self.asked if r.path.endswith(f"/{name}"))


def stand_in(root, monkeypatch, cache):
    """A generator for a fixture: the clients of this process ask a server of its own."""
    import datasets
    from huggingface_hub import constants

    root.mkdir(parents=True, exist_ok=True)
    with serving(root) as (address, asked):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        for place in (constants, datasets.config):  # whatever the environment says
            monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
        yield StandIn(root, address, asked)
