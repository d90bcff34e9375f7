"""Preparation as a step of its own: parts, processes, kills, two at once, copies behind a URL."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import GOLDEN
from hub_tools import get_rows
from made_up_split import MadeUpSplit
from runs import run, tiny

from data import packing, preparation, remote_cache, shards, token_rows
from data.packing import RowFormat
from data.readers import Piece
from data.remote_cache import CacheDir
from data.tokenizer import get_tokenizer

FILES = ("ids.bin", "counts.bin", "marks.bin")
WORDS = ("the", "license", "shall", "be", "provided", "under", "terms", "of", "this", "notice")


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer(str(GOLDEN / "tokenizer"))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    """Parts of a few documents, and no threads: these tests fork."""
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 1 << 12)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def texts(count, seed=0):
    pick = random.Random(seed)
    return [" ".join(pick.choices(WORDS, k=pick.randrange(40))) for _ in range(count)]


def pieces(count):
    """Documents, every seventh of them in two pieces."""
    for i, text in enumerate(texts(count)):
        if i % 7 == 0:
            cut = text.find(" ", len(text) // 2)
            yield Piece(text[: max(cut, 0)], False, i / count)
            text = text[max(cut, 0) :]
        yield Piece(text, True, (i + 1) / count)


def row_format(**changes):
    settings = {"length": 16, "wrap": True, "insert_eos": True, "insert_special": True}
    return RowFormat(**(settings | changes), bos=1, eos=2, pad=0)


@pytest.fixture
def rows(tmp_path):
    """Where prepared folders lie in a cache."""
    return tmp_path / "rows"


def prepare(folder, tokenizer, *, count=400, how=None, encode=None, read=None, processes=1):
    split = MadeUpSplit(
        read or (lambda: pieces(count)),
        encode or tokenizer.encode_batch,
        how or row_format(),
        tokenizer.vocab_size,
        folder_name=folder.name,
    )
    made = preparation.prepare(split, CacheDir(folder.parents[1]), processes)
    assert made.folder == folder
    return made


def content(folder):
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def forked(work) -> int:
    """The id of a process that does the work and ends with 0, or 1 where it raised."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def ended(child) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Parts and processes

SHAPES = {
    "wrapped": {},
    "no_eos": {"insert_eos": False},
    "bare": {"insert_special": False},
    "unwrapped": {"wrap": False},
    "apart": {"align": 4},
    "whole": {"align": 4, "whole": True},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_rows_are_those_of_one_pass_for_any_number_of_processes(changes, tokenizer, rows):
    """Against the whole text tokenized and packed at once."""
    how = row_format(**changes)
    given = list(pieces(400))
    ids = tokenizer.encode_batch([piece.text for piece in given])
    tokens = packing.Tokens.of(ids, [piece.ends for piece in given])
    chunks = list(packing.packed([tokens], how))
    numbers = (0, 1, 2, 5) if changes == {} else (1, 3)
    made = {n: prepare(rows / str(n), tokenizer, how=how, processes=n) for n in numbers}
    np.testing.assert_array_equal(made[1].ids, np.concatenate([chunk.ids for chunk in chunks]))
    np.testing.assert_array_equal(
        made[1].counts, np.concatenate([chunk.counts for chunk in chunks])
    )
    for n in numbers:
        assert content(made[n].folder) == content(made[1].folder)
    assert made[1].about["tokens"] == sum(len(ids) for ids in tokenizer.encode_batch(texts_of()))


def texts_of():
    return [piece.text for piece in pieces(400)]


def test_several_processes_tokenize(tokenizer, tmp_path, rows):
    def encode(batch):
        (tmp_path / str(os.getpid())).touch()
        return tokenizer.encode_batch(batch)

    prepare(rows / "rows", tokenizer, encode=encode, processes=3)
    seen = {path.name for path in tmp_path.iterdir() if path.name.isdigit()}
    assert len(seen) > 1
    assert str(os.getpid()) not in seen


def test_a_text_of_one_part_needs_no_process(tokenizer, rows):
    seen = []

    def encode(batch):
        seen.append(os.getpid())
        return tokenizer.encode_batch(batch)

    prepare(rows / "rows", tokenizer, count=20, encode=encode, processes=4)
    assert seen == [os.getpid()]


@pytest.mark.parametrize("processes", [1, 2])
def test_few_parts_are_read_ahead(processes, tokenizer, rows):
    """Memory does not grow with the corpus: reading waits for what is under way."""
    read = furthest = 0

    def counted():
        nonlocal read, furthest
        for piece in pieces(1500):
            read += len(piece.text)
            parts = sum(1 for _ in rows.glob("rows.tmp/*.npz"))
            furthest = max(furthest, read // shards.SHARD_CHARACTERS - parts)
            yield piece

    prepare(rows / "rows", tokenizer, read=counted, processes=processes)
    assert read // shards.SHARD_CHARACTERS > 25
    assert furthest <= 2 * processes + 2


# Interruptions


MOMENTS = {  # what the process that prepares is about to call for the n-th time
    "in the middle of the text": (shards, "tokenize", 9),
    "rows to be written": (token_rows, "save", 1),
    "about.json to be written": (preparation, "write_text", 2),
    "the folder has its name": (shutil, "rmtree", 1),
}


@pytest.mark.parametrize(("module", "name", "number"), MOMENTS.values(), ids=MOMENTS)
def test_after_a_kill_the_result_is_the_same_and_nothing_is_left(
    module, name, number, tokenizer, rows
):
    whole, folder = prepare(rows / "whole", tokenizer), rows / "killed"

    def killed():
        original, calls = getattr(module, name), itertools.count(1)

        def call(*arguments, **options):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(module, name, call)  # in this process, which ends
        prepare(folder, tokenizer)

    assert ended(forked(killed)) == -signal.SIGKILL
    assert preparation.work_folder(folder).is_dir()
    assert folder.exists() == (name == "rmtree")
    assert content(prepare(folder, tokenizer).folder) == content(whole.folder)
    left = {path.name for path in rows.iterdir()}
    assert left == {"whole", "whole.lock", "killed", "killed.lock"}


@pytest.mark.slow
def test_killed_ten_times_at_random_moments_the_result_is_the_same(tokenizer, rows):
    began = time.monotonic()
    whole = content(prepare(rows / "whole", tokenizer, count=2500, processes=2).folder)
    seconds = time.monotonic() - began
    folder, pick = rows / "killed", random.Random(5)
    for _ in range(10):
        child = forked(lambda: prepare(folder, tokenizer, count=2500, processes=2))
        time.sleep(pick.uniform(0, 0.6 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if folder.exists():
            assert content(folder) == whole
            shutil.rmtree(folder)
    assert content(prepare(folder, tokenizer, count=2500, processes=2).folder) == whole
    left = {path.name for path in rows.iterdir()}
    assert left == {"whole", "whole.lock", "killed", "killed.lock"}


def test_what_was_finished_is_not_tokenized_again(tokenizer, rows):
    seen = []

    def encode(batch):
        seen.extend(batch)
        return tokenizer.encode_batch(batch)

    options = {"encode": encode, "processes": 1}
    with pytest.raises(OSError, match="connection lost"):
        prepare(rows / "rows", tokenizer, read=lambda: lost(300), **options)
    before = len(seen)
    assert before > 100
    assert not (rows / "rows").exists()
    made = prepare(rows / "rows", tokenizer, **options)
    assert sorted(seen) == sorted(texts_of())
    whole = prepare(rows / "whole", tokenizer)
    assert content(made.folder) == content(whole.folder)
    assert made.about["tokens"] == whole.about["tokens"]


def test_a_torn_part_and_parts_cut_otherwise_are_not_taken(tokenizer, rows, monkeypatch):
    whole = prepare(rows / "whole", tokenizer)
    work = preparation.work_folder(rows / "rows")

    with pytest.raises(OSError, match="connection lost"):
        prepare(rows / "rows", tokenizer, read=lambda: lost(300))
    (work / "000001.npz").rename(work / "000001.part")
    made = prepare(rows / "rows", tokenizer)
    assert content(made.folder) == content(whole.folder)

    with pytest.raises(OSError, match="connection lost"):
        prepare(rows / "other", tokenizer, read=lambda: lost(300))
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 1 << 11)
    made = prepare(rows / "other", tokenizer)
    assert content(made.folder) == content(whole.folder)


def test_a_damaged_part_is_made_again(tokenizer, rows):
    whole = prepare(rows / "whole", tokenizer)
    with pytest.raises(OSError, match="connection lost"):
        prepare(rows / "rows", tokenizer, read=lambda: lost(300))
    files = sorted(preparation.work_folder(rows / "rows").glob("*.npz"))
    assert len(files) > 3
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(b"")
    damaged = bytearray(files[2].read_bytes())
    damaged[200] ^= 1
    files[2].write_bytes(damaged)
    assert content(prepare(rows / "rows", tokenizer).folder) == content(whole.folder)


def lost(at):
    yield from list(pieces(400))[:at]
    raise OSError("connection lost")


def test_a_process_that_is_ended_from_outside_is_one_message(tokenizer, rows):
    def encode(batch):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(OSError, match="ended from outside, perhaps for want of memory"):
        prepare(rows / "rows", tokenizer, encode=encode, processes=2)
    assert not (rows / "rows").exists()
    prepare(rows / "rows", tokenizer)


def test_the_others_end_whatever_this_process_does_with_sigterm(tokenizer, rows):
    """As in a run of main.py, which hears the signal: processes that were forked must not."""

    def encode(batch):
        os.kill(os.getpid(), signal.SIGKILL)

    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with pytest.raises(OSError, match="ended from outside"):
            prepare(rows / "rows", tokenizer, encode=encode, processes=2)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_process_that_ended_before_a_part_was_handed_over_is_the_same_message(tmp_path):
    part = shards.Shard(0, ["a"], [True], 1.0)

    def hand_over():
        work = partial(shards.tokenize, encode=lambda batch: [[1]] * len(batch), vocab_size=9)
        with shards.workers(2, work) as submit:
            submit(tmp_path / "0.npz", part).result()
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            for _ in range(1000):
                submit(tmp_path / "1.npz", part)
                time.sleep(0.01)

    with pytest.raises(OSError, match="ended from outside"):
        hand_over()


def test_processes_end_with_the_one_they_work_for(tokenizer, tmp_path, rows):
    def encode(batch):
        (tmp_path / f"pid-{os.getpid()}").touch()
        return tokenizer.encode_batch(batch)

    work = partial(prepare, rows / "rows", tokenizer, encode=encode, count=20_000, processes=2)
    child = forked(work)
    while len(pids := list(tmp_path.glob("pid-*"))) < 2:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    end = time.monotonic() + 20
    while any(Path(f"/proc/{path.name[4:]}").exists() for path in pids):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not (rows / "rows").exists()


def noting(tokenizer, folder, seconds=0.0, until=None):
    """An encode that takes `seconds` a batch and adds to a file of its process what it got; until:
    of the process, the batches after which it gets SIGKILL, once."""

    def encode(batch):
        with (folder / f"tokenized-{os.getpid()}").open("a") as file:
            file.writelines(f"{text}\n" for text in batch)
        time.sleep(seconds)
        found = tokenizer.encode_batch(batch)
        count.append(1)
        if len(count) == until:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    count = []
    return encode


def noted(folder):
    """{the number of the process: texts that it tokenized}."""
    files = folder.glob("tokenized-*")
    return {int(f.name.split("-")[1]): f.read_text().split("\n")[:-1] for f in files}


def test_processes_that_ask_for_the_same_rows_share_their_parts(tokenizer, tmp_path, rows):
    """Of 1, 2 and 4: the same bits, and no text is tokenized twice."""
    whole = prepare(rows / "whole", tokenizer, count=800)
    for count in (2, 4):
        (notes := tmp_path / f"by-{count}").mkdir()
        encode = noting(tokenizer, notes, seconds=0.1)
        work = partial(prepare, rows / str(count), tokenizer, encode=encode, count=800)
        assert [ended(child) for child in [forked(work) for _ in range(count)]] == [0] * count
        assert content(rows / str(count)) == content(whole.folder)
        by = noted(notes)
        assert len(by) == count
        tokenized = [text for done in by.values() for text in done]
        assert sorted(tokenized) == sorted(piece.text for piece in pieces(800))
    left = {path.name for path in rows.iterdir()}
    assert left == {name + end for name in ("whole", "2", "4") for end in ("", ".lock")}


def test_of_processes_that_share_a_bad_text_each_says_so_and_nothing_is_left(
    tokenizer, tmp_path, rows
):
    def broken():
        yield from itertools.islice(pieces(800), 400)
        raise ValueError("line 401 is bad")

    def work(number):
        encode = noting(tokenizer, tmp_path, seconds=0.05 + 0.2 * number)
        with pytest.raises(ValueError, match="line 401 is bad"):
            prepare(rows / "rows", tokenizer, encode=encode, read=broken)

    assert [ended(child) for child in [forked(partial(work, n)) for n in range(3)]] == [0, 0, 0]
    assert len(noted(tmp_path)) == 3
    assert not (rows / "rows").exists()
    assert not preparation.work_folder(rows / "rows").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_shares_parts_and_is_killed_leaves_its_part_to_the_others(
    killed, tokenizer, tmp_path, rows
):
    """The first one to come, which is to write the rows, or the second."""
    whole = prepare(rows / "whole", tokenizer, count=800)
    children = []
    for number in range(3):
        until = 2 if number == killed else None
        encode = noting(tokenizer, tmp_path, seconds=0.1, until=until)
        work = partial(prepare, rows / "rows", tokenizer, encode=encode, count=800)
        children.append(forked(work))
        while number == 0 and not (preparation.work_folder(rows / "rows") / "plan.json").exists():
            time.sleep(0.01)
    codes = [ended(child) for child in children]
    assert codes.pop(killed) == -signal.SIGKILL
    assert codes == [0, 0]
    assert content(rows / "rows") == content(whole.folder)
    left = {path.name for path in rows.iterdir()}
    assert left == {"whole", "whole.lock", "rows", "rows.lock"}


def test_parts_that_may_not_be_deleted_are_an_error_at_once(tmp_path):
    """Another user's, who was killed while they were deleted."""
    work = preparation.work_folder(tmp_path / "rows")
    work.mkdir()
    (work / "000001.npz").touch()

    def remove():
        signal.alarm(20)
        os.chdir(tmp_path)
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(PermissionError):
            preparation.remove_parts(Path("rows"))

    for folder in (tmp_path, work):
        folder.chmod(0o555)
    assert ended(forked(remove)) == 0
    for folder in (tmp_path, work):
        folder.chmod(0o755)


def test_of_the_processes_of_a_launcher_on_one_machine_the_first_prepares(
    tokenizer, tmp_path, rows, monkeypatch
):
    encode = noting(tokenizer, tmp_path, seconds=0.02)
    work = partial(prepare, rows / "rows", tokenizer, encode=encode)
    children = []
    for number in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        children.append(forked(work))
        while number == 0 and not preparation.work_folder(rows / "rows").exists():
            time.sleep(0.01)
    assert [ended(child) for child in children] == [0, 0, 0]
    assert noted(tmp_path).keys() == {children[0]}


# Errors


def test_a_bad_line_in_the_middle_leaves_nothing(tokenizer, tmp_path):
    lines = [json.dumps({"text": text}) for text in texts(1000)]
    lines[600] = '{"text": "cut off'
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(lines))
    cache = tmp_path / "cache"
    for processes in (1, 2):
        with pytest.raises(ValueError, match=r"lines.jsonl, line 601 is not JSON"):
            get_rows(
                str(path),
                "train",
                tokenizer=tokenizer,
                length=16,
                cache_dir=cache,
                processes=processes,
            )
        assert list((cache / "rows").iterdir()) == []


def test_an_error_in_a_process_is_the_callers(tokenizer, rows):
    def encode(batch):
        return [[tokenizer.vocab_size] for _ in batch]

    with pytest.raises(ValueError, match=rf"gave the id {tokenizer.vocab_size}, but"):
        prepare(rows / "rows", tokenizer, encode=encode, processes=2)
    assert list(rows.iterdir()) == []


def test_a_text_without_tokens_is_refused(tokenizer, rows):
    with pytest.raises(ValueError, match=r"0 tokens in 3 documents: not one row of model.length=9"):
        prepare(
            rows / "rows",
            tokenizer,
            read=lambda: [Piece("", True, 1.0)] * 3,
            how=row_format(length=9, insert_eos=False),
        )
    assert list(rows.iterdir()) == []


def test_rows_of_empty_documents_are_refused(tokenizer, rows):
    with pytest.raises(ValueError, match="has 0 tokens in 300 documents"):
        prepare(rows / "rows", tokenizer, read=lambda: [Piece("", True, 1.0)] * 300)
    assert list(rows.iterdir()) == []


# Behind a URL


@pytest.fixture
def memory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine-1"))
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def test_rows_behind_a_url_are_made_once_and_then_copied(tokenizer, memory, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts(100)))
    ask = partial(get_rows, str(path), "train", tokenizer=tokenizer, length=16)
    first = ask(cache_dir="memory://data/")
    assert first.folder.is_relative_to(tmp_path / "machine-1" / "bamdlm" / "mirrors")
    monkeypatch.setattr(preparation, "write", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine-2"))
    second = ask(cache_dir="memory://data")
    assert second.folder.is_relative_to(tmp_path / "machine-2")
    assert content(second.folder) == content(first.folder)
    assert not list(tmp_path.glob("memory*"))

    memory.rm(f"/data/rows/{first.folder.name}/about.json")  # as if copying had been cut off
    assert not remote_cache.is_complete(f"memory://data/rows/{first.folder.name}")
    ask(cache_dir="memory://data")  # a machine that has it completes the copy
    assert remote_cache.is_complete(f"memory://data/rows/{first.folder.name}")

    memory.rm(f"/data/rows/{first.folder.name}/about.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine-3"))
    with pytest.raises(TypeError):  # `write` is called: half a copy is not taken
        ask(cache_dir="memory://data")


@pytest.mark.parametrize(
    ("url", "why"),
    [("nosuch://data", "Protocol not known"), ("broken://data", "NoCredentials: log in first")],
)
def test_a_url_that_cannot_be_used_is_one_message(url, why, tokenizer, memory, tmp_path):
    class NoCredentials(Exception):
        """Of a file system's own."""

    class Broken(fsspec.AbstractFileSystem):
        def exists(self, path, **_):
            raise NoCredentials("log in first")

    fsspec.register_implementation("broken", Broken, clobber=True)
    (tmp_path / "a.txt").write_text("the work")
    with pytest.raises(OSError, match=rf"data.cache_dir: {url}/rows/.* cannot be used \(.*{why}"):
        get_rows(str(tmp_path / "a.txt"), "train", tokenizer=tokenizer, length=16, cache_dir=url)
    assert not list(tmp_path.rglob("*.lock"))


def test_prepared_rows_live_in_s3_as_well(tokenizer, tmp_path, s3):
    path, found = tmp_path / "a.txt", tmp_path / "found.json"
    path.write_text("\n".join(texts(100)))

    def work():
        os.environ.update(s3, XDG_CACHE_HOME=str(tmp_path))
        fs = fsspec.filesystem("s3")
        fs.mkdir("prepared")
        url = "s3://prepared/x"
        made = get_rows(str(path), "train", tokenizer=tokenizer, length=16, cache_dir=url)
        files = fs.ls(f"prepared/x/rows/{made.folder.name}", detail=False)
        names = sorted(name.rpartition("/")[2] for name in files)
        found.write_text(json.dumps([len(made), names]))

    assert ended(forked(work)) == 0
    rows, files = json.loads(found.read_text())
    assert rows > 10
    assert files == ["about.json", "counts.bin", "ids.bin"]


# The command


def test_the_mode_prepares_what_training_then_finds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, log = tiny(tmp_path), tmp_path / "log"
    code, said = run([*arguments, "mode=prepare"], log)
    assert code == 0, said
    assert "train: train.txt, 1 documents" in said.replace(str(tmp_path) + "/", "")
    assert not (tmp_path / "outputs").exists()
    code, said = run([*arguments, "trainer.max_steps=2", "trainer.val_check_interval=2"], log)
    assert code == 0, said
    assert "prepared" not in said
    code, said = run([*arguments, "mode=prepare", "data.train=null"], log)
    assert code == 0, said
    assert "train:" not in said


def test_a_data_error_of_the_mode_is_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": }\n')
    arguments = [*tiny(tmp_path), "mode=prepare", f"data.train={tmp_path / 'bad.jsonl'}"]
    code, said = run(arguments, tmp_path / "log")
    assert code == 2
    assert "this run cannot start:" in said
    assert "bad.jsonl: line 2 is not JSON" in said
    assert "Traceback" not in said
    assert list((tmp_path / "cache" / "rows").iterdir()) == []


def test_an_error_of_the_local_folder_is_not_told_as_one_of_the_url(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        remote_cache.publish(tmp_path / "gone", (tmp_path / "remote").as_uri())
