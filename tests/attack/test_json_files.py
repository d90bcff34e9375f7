"""JSON files of ours that are something else: reading them ends, with words."""

import os

import pytest
from tools import bounded

from settings import load
from settings.run_folder import newest_checkpoint
from utils import read_json

KINDS = ["a FIFO", "a device", "a folder", "nested", "no JSON", "bytes"]


def place(path, kind: str) -> None:
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    else:
        path.write_bytes({"nested": b"[" * 200_000, "no JSON": b"{", "bytes": b"\xff\xfe"}[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_in_words(tmp_path, kind):
    place(tmp_path / "a.json", kind)
    with bounded(10), pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


def test_more_than_its_bound_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 29)
    with bounded(10), pytest.raises(ValueError, match="has more than"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_folder_with_it_is_passed_over(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs/run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/last.ckpt").touch()
    place(run / "settings.json", kind)
    config = load(["mode=ppl_eval", "algo=mdlm", "data=text8"])
    with bounded(10):
        assert newest_checkpoint(config) is None
