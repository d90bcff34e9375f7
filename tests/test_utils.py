"""Files and folders that appear whole, locks, and the errors of the hub."""

import os
import shutil
import signal
from types import SimpleNamespace

import filelock
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from data.hub_errors import HubUnreachable, hub_errors
from utils import atomic_file, atomic_folder, atomic_link, lock


def names(folder):
    return {path.name for path in folder.iterdir()}


def killed(work):
    """Do the work in another process, which then kills itself."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


# Files and folders


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "a.txt"

    def broken_off(mode, text):
        with atomic_file(path, mode) as file:
            file.write(text)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off("w", "half")
    assert names(path.parent) == set()
    with atomic_file(path) as file:
        file.write("whole é")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "whole é"
    with pytest.raises(KeyboardInterrupt):
        broken_off("wb", b"half")
    assert path.read_text(encoding="utf-8") == "whole é"
    assert names(path.parent) == {"a.txt"}


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_replaces_the_file_that_had_it(links, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    source, path = tmp_path / "source", tmp_path / "path"
    source.write_text("new")
    path.write_text("old")
    atomic_link(path, source)
    assert path.read_text() == "new"
    assert path.samefile(source) == links
    with pytest.raises(FileNotFoundError):
        atomic_link(path, tmp_path / "missing")
    assert path.read_text() == "new"
    assert {each.name for each in tmp_path.iterdir()} == {"source", "path"}


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a"

    def make(name, *, end=True, **options):
        with atomic_folder(path, **options) as new:
            (new / name).touch()
            assert path.exists() == (name != "first")
            if not end:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("first", end=False)
    assert names(tmp_path) == set()
    make("first")
    with pytest.raises(OSError, match=r"-> .*/a'"):
        make("second")
    with pytest.raises(KeyboardInterrupt):
        make("third", end=False, overwrite=True)
    assert names(path) == {"first"}
    make("fourth", overwrite=True)
    assert names(path) == {"fourth"}
    assert names(tmp_path) == {"a"}
    (path / "fourth").unlink()
    make("fifth")  # an empty folder is replaced
    assert names(path) == {"fifth"}


def old_folder(tmp_path, monkeypatch, refused):
    """A folder with a file `old`; no folder with one of the `refused` files takes its name."""
    path = tmp_path / "a"
    path.mkdir()
    (path / "old").touch()
    rename = os.rename

    def full(source, target):
        if target == path and any((source / name).exists() for name in refused):
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    return path


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path = old_folder(tmp_path, monkeypatch, ["new"])
    with (
        pytest.raises(OSError, match="no space left"),
        atomic_folder(path, overwrite=True) as new,
    ):
        (new / "new").touch()
    assert names(path) == {"old"}
    assert names(tmp_path) == {"a"}


def test_an_old_folder_is_back_before_anything_is_removed(tmp_path, monkeypatch):
    """To remove what was made may take long enough to be killed meanwhile."""
    path = old_folder(tmp_path, monkeypatch, ["new"])

    def replace():
        with atomic_folder(path, overwrite=True) as new:
            (new / "new").touch()

    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: kill_me())
    killed(replace)
    assert names(path) == {"old"}


def test_an_old_folder_that_cannot_be_put_back_is_not_lost(tmp_path, monkeypatch):
    path = old_folder(tmp_path, monkeypatch, ["new", "old"])
    with (
        pytest.raises(OSError, match="no space left"),
        atomic_folder(path, overwrite=True) as new,
    ):
        (new / "new").touch()
    (kept,) = tmp_path.iterdir()
    assert names(kept) == {"old"}


def test_what_a_killed_process_left_goes_where_the_lock_is_held(tmp_path):
    def begin(name):
        with atomic_folder(tmp_path / name):
            kill_me()

    killed(lambda: begin("a"))
    killed(lambda: begin("a.b"))
    assert len(names(tmp_path)) == 2
    with atomic_folder(tmp_path / "a", locked=True):
        pass
    left = names(tmp_path) - {"a"}
    assert [name.startswith(".a.b.") for name in left] == [True]


# Locks


def test_a_lock_goes_with_its_process_and_says_that_it_is_waited_for(tmp_path, caplog):
    caplog.set_level("INFO", "bamdlm")
    path = tmp_path / "a"
    with lock(path, waiting="waiting for a"):
        assert names(tmp_path) == {"a.lock"}
        with pytest.raises(filelock.Timeout), lock(path, 0, waiting="waiting for a"):
            pass
    assert caplog.messages == ["waiting for a"]
    assert names(tmp_path) == set()

    def hold():
        with lock(path):
            kill_me()

    killed(hold)
    with lock(path, 0):
        path.touch()
    assert names(tmp_path) == {"a", "a.lock"}
    assert caplog.messages == ["waiting for a"]


# The hub


def response(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


ANSWERS = {
    "gated": (errors.GatedRepoError("403", response=response(403)), "accept it on its page"),
    "no repository": (errors.RepositoryNotFoundError("404", response=response(404)), "not there"),
    "no revision": (errors.RevisionNotFoundError("404", response=response(404)), "no such branch"),
}
SILENCES = {
    "no network": errors.HTTPError("no route\nto host"),
    "an ill server": errors.HfHubHTTPError("no route", response=response(503)),
    "a broken socket": ConnectionError("no route"),
}


@pytest.mark.parametrize(("error", "message"), ANSWERS.values(), ids=ANSWERS)
def test_what_the_hub_answers_is_one_sentence(error, message):
    with (
        pytest.raises(FileNotFoundError, match=f"^me/x.*{message}.*$") as raised,
        hub_errors("me/x", absent=" is not there"),
    ):
        raise error
    assert not isinstance(raised.value, HubUnreachable)


@pytest.mark.parametrize("error", SILENCES.values(), ids=SILENCES)
def test_a_hub_that_does_not_answer_is_told_apart(error):
    with (
        pytest.raises(HubUnreachable, match=r"^me/x: the hub cannot be reached \(no route\)$"),
        hub_errors("me/x", absent=" is not there"),
    ):
        raise error


def test_an_error_of_the_disk_is_not_called_a_silent_hub():
    with (
        pytest.raises(PermissionError, match="no right to write"),
        hub_errors("me/x", absent=" is not there"),
    ):
        raise PermissionError("no right to write")


def test_files_of_a_folder_are_as_readable_as_it_is(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "made") as made:
            save_file({"a": torch.zeros(1)}, made / "model.safetensors")  # by itself 0600
            (made / "run.sh").write_text("")
            (made / "run.sh").chmod(0o700)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "made").iterdir()}
    assert modes == {"model.safetensors": 0o640, "run.sh": 0o740}
