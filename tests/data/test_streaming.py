"""Training rows straight from the text: their order, bookmarks, devices, runs that are killed."""

import itertools
import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hub_tools import get_rows, put_table, stand_in
from made_up_split import MadeUpSplit
from runs import Run, finish, ranks, run, tiny
from test_hub_corpora import LAYOUTS, card, write_card

import dataloader
from data import packing, streaming
from data.order import InOrder, TrainBatches
from data.packing import RowFormat
from data.readers import Piece
from data.split import Split
from data.streaming import Stream, StreamedText, TextError, UnitStart, streamed
from data.tokenizer import get_tokenizer
from dataloader import DataModule
from random_streams import order

SEED, VOCABULARY = 3, 0x8000


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    monkeypatch.setattr(streaming, "UNIT_CHARACTERS", 300)


def row_format(**changes):
    settings = {"length": 8, "wrap": True, "insert_eos": True, "insert_special": False}
    return RowFormat(**(settings | changes), bos=1, eos=2, pad=0)


def encode(texts):
    """A token for a character."""
    return [[ord(character) for character in text] for text in texts]


def write(part, documents, longest=60):
    """Pieces of a part: letters that tell documents apart; every fifth document is in two."""
    pick = random.Random(part)
    for number in range(documents):
        text = chr(0x1000 + 500 * part + number) * pick.randrange(1, longest)
        if number % 5 == 0:
            yield Piece(text[:3], False, 0.0)
            text = text[3:]
        yield Piece(text, True, (number + 1) / documents)


def text(parts=4, documents=200, **changes):
    readers = [lambda part=part: write(part, documents) for part in range(parts)]
    return streamed_text(readers, row_format(**changes))


def streamed_text(readers, how=None, encode=encode, vocab_size=VOCABULARY, by_files=False):
    split = MadeUpSplit(None, encode, how or row_format(), vocab_size)
    return StreamedText(split, readers, by_files)


def text_by_files(parts=60, documents=20, opened=None, **changes):
    """opened: gets the number of each part that is read."""

    def reader(part):
        if opened is not None:
            opened.append(part)
        return write(part, documents)

    readers = [lambda part=part: reader(part) for part in range(parts)]
    return streamed_text(readers, row_format(**changes), vocab_size=0x10000, by_files=True)


def read(stream, first, last):
    return stream.read(range(first, last)).ids.tolist()


# The order


def test_the_wrapped_rows_of_an_epoch_are_its_text(monkeypatch):
    """Of one lane: the rows of all units, put back in order, are the text with EOS after each
    document; what is left over goes on in the next epoch."""
    monkeypatch.setattr(streaming, "LANES", 1)
    given = text(parts=1)
    whole = []
    for piece in write(0, 200):
        whole += [ord(character) for character in piece.text] + [2] * piece.ends
    flat = in_order(Stream(given, SEED, lanes=[0]), epochs=2).ravel().tolist()
    assert len(flat) > 2 * len(whole)
    assert flat == (whole * 3)[: len(flat)]


@pytest.mark.parametrize("changes", [{"wrap": False}, {"align": 4}], ids=["unwrapped", "apart"])
def test_other_rows_of_an_epoch_are_those_of_its_documents(changes, monkeypatch):
    """Of one lane, put back in order: the rows that are prepared; where documents are apart, a unit
    ends with a padded row, so there the tokens are the same."""
    monkeypatch.setattr(streaming, "LANES", 1)
    how = row_format(**changes)
    given = streamed_text([lambda: write(0, 200)], how)
    texts, ends, _ = zip(*write(0, 200), strict=True)
    tokens = packing.Tokens.of(encode(texts), ends)
    prepared = np.concatenate([chunk.ids for chunk in packing.packed([tokens], how)])
    found = in_order(Stream(given, SEED, lanes=[0]), epochs=2)
    assert len(found) > len(prepared)
    if how.align is None:
        assert found[: len(prepared)].tolist() == prepared.tolist()
    else:
        prepared, found = prepared[prepared > 0], found[found > 0]
        assert found[: len(prepared)].tolist() == prepared.tolist()


def test_documents_that_fit_into_a_row_are_streamed_whole():
    """Each document is made of a character of its own, and has EOS behind it."""
    readers = [lambda part=part: write(part, 200, longest=8) for part in range(4)]
    rows = Stream(streamed_text(readers, row_format(align=2, whole=True)), SEED).read(range(480))
    whole = Counter(letter for reader in readers for piece in reader() for letter in piece.text)
    numbers = packing.document_ids(rows.marks, 8)
    for ids, documents in zip(rows.ids, numbers, strict=True):
        for number in range(1, documents.max() + 1):
            *letters, end = ids[documents == number].tolist()
            assert end == 2
            assert letters == [letters[0]] * whole[chr(letters[0])]
    assert (numbers == 0).mean() < 0.3  # S / 2 of a document is lost to the border


def in_order(stream, epochs):
    """All rows of a stream with one lane, each unit's in the order of the text."""
    (lane,), found = stream.lanes.values(), []
    while lane.bookmark.start.epoch < epochs:
        stream.row(lane.end)
        shuffled = order(SEED, "unit", lane.bookmark.start.unit, len(lane.rows.ids))
        found.append(lane.rows.ids[np.argsort(shuffled)])
    return np.concatenate(found)


def test_rows_come_in_another_order_than_the_text_and_by_seed():
    rows = read(Stream(text(), SEED), 0, 480)
    assert read(Stream(text(), SEED), 0, 480) == rows
    assert read(Stream(text(), SEED + 1), 0, 480) != rows
    sources = [(max(row) - 0x1000) // 500 for row in rows]
    assert all(len(set(sources[i : i + 48])) > 1 for i in range(0, 480, 48))


def test_every_epoch_reads_the_parts_in_another_order():
    pieces = sum(1 for _ in write(0, 200))
    units = streaming.units(text().parts, SEED, UnitStart(0, 0, 0, 0), anywhere=True)
    texts = itertools.chain.from_iterable(unit.texts for unit in units)
    orders = []
    for _ in range(6):
        heads = list(itertools.islice(texts, 4 * pieces))[1::pieces]
        orders.append(tuple((ord(head[0]) - 0x1000) // 500 for head in heads))
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(set(orders)) > 1


def test_no_lane_gets_more_text_than_others_in_the_long_run():
    """An epoch of as many units as lanes, half of them with three times the tokens: if a lane got
    the same ones in every epoch, more and more would be read and wait for the other lanes."""

    def dense(texts):
        return [[ord(text[0])] * (len(text) * (3 if text[0] == "a" else 1)) for text in texts]

    units = [Piece(letter * 300, True, 0.0) for letter in "ab" * (streaming.LANES // 2)]
    stream = Stream(streamed_text([lambda: units], encode=dense), SEED)
    stream.read(range(streaming.LANES * 75 * 40))  # 75 rows a unit, the mean: 40 epochs
    assert max(len(lane.waiting) for lane in stream.lanes.values()) < 30


@pytest.mark.parametrize(
    "changes", [{}, {"wrap": False}, {"align": 4}, {"align": 4, "whole": True}], ids=str
)
def test_units_can_be_read_from_any_place(changes):
    anywhere = not changes
    given = text(parts=3, documents=30)
    units = streaming.units(given.parts, SEED, UnitStart(0, 0, 0, 0), anywhere=anywhere)
    first = list(itertools.islice(units, 40))
    assert first[-1].start.epoch > 1
    for at in range(0, 40, 3):
        again = streaming.units(given.parts, SEED, first[at].start, anywhere=anywhere)
        assert next(again) == first[at]
        assert at == 39 or next(again) == first[at + 1]
    if not anywhere:
        assert all(unit.ends[-1] for unit in first)


# Devices and workers


KINDS = pytest.mark.parametrize("text", [text, text_by_files], ids=["units", "files"])


@KINDS
@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_devices_together_see_the_rows_that_one_sees(world_size, text):
    alone = read(Stream(text(), SEED), 0, 120 * world_size)
    seen = {}
    for rank in range(world_size):
        lanes = streaming.lanes_of(rank, world_size)
        stream = Stream(text(), SEED, lanes=lanes)
        batches = TrainBatches(InOrder(), 4, rank, world_size, lambda: 0, in_turn=True)
        for batch in itertools.islice(batches, 30):
            positions = [place.position for place in batch]
            assert not seen.keys() & set(positions)
            seen |= dict(zip(positions, stream.read(positions).ids.tolist(), strict=True))
    assert [seen[position] for position in range(120 * world_size)] == alone


def test_a_device_tokenizes_its_lanes_only():
    tokenized = []

    def counting(texts):
        tokenized.append(sum(map(len, texts)))
        return encode(texts)

    given = text()
    given = streamed_text(given.parts, encode=counting)
    work = []
    for world_size in (1, 4):
        tokenized.clear()
        stream = Stream(given, SEED, lanes=streaming.lanes_of(0, world_size))
        stream.read(range(0, 960, world_size))
        work.append(sum(tokenized))
    assert work[1] < 0.35 * work[0]


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_a_device_opens_the_files_of_its_lanes_and_no_others(world_size):
    """Of 96 files, in two epochs; together the devices open all."""
    opened, seen = [], set()
    given = text_by_files(parts=96, opened=opened)
    for rank in range(world_size):
        opened.clear()
        stream = Stream(given, SEED, lanes=streaming.lanes_of(rank, world_size))
        for lane in stream.lanes.values():
            while lane.bookmark.start.epoch == 0:
                stream.advance(lane)
        now, later = (
            {part for lane in stream.lanes for part in order(SEED, "parts", epoch, 96)[lane::48]}
            for epoch in (0, 1)
        )
        assert now <= {*opened} <= now | later
        seen |= now
    assert seen == {*range(96)}


def test_too_few_files_for_the_lanes_are_refused():
    with pytest.raises(ValueError, match=r"data.stream_by=files: .* has 47 files, and 48 are need"):
        text_by_files(parts=47)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_loader_gives_the_rows_of_the_stream(workers):
    data = module(text(), num_workers=workers)
    batches = list(itertools.islice(data.train_dataloader(), 12))
    assert [batch["row"].tolist() for batch in batches[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    rows = [row for batch in batches for row in batch["input_ids"].tolist()]
    assert rows == read(Stream(text(), SEED), 0, 48)
    assert all(batch["attention_mask"].all() for batch in batches)
    assert all(batch["input_ids"].dtype == torch.int64 for batch in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_new_epoch_shows_what_was_fetched_ahead_and_not_trained_on(workers, monkeypatch):
    """Far ahead: the rows have gone by, and are read again."""
    monkeypatch.setattr(dataloader, "BOOKMARK_EVERY", 3)
    data = module(text(), num_workers=workers)
    rows = read(Stream(text(), SEED), 0, 1000)
    loader = data.train_dataloader()
    for start, batches in ((0, 200), (400, 100), (4, 5), (720, 40)):
        data.start_at(start)
        found = list(itertools.islice(loader, batches))
        seen = [row for batch in found for row in batch["input_ids"].tolist()]
        assert seen == rows[start : start + 4 * batches]


def module(given, **settings):
    defaults = {"length": 8, "batch_size": 4, "eval_batch_size": 4, "seed": SEED}
    return DataModule(train=given, valid=None, **(defaults | settings))


@pytest.mark.parametrize("workers", [0, 1])
def test_padding_and_segments_reach_the_batch(workers):
    data = module(text(wrap=False), num_workers=workers)
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
    assert "document_ids" not in batch
    data = module(text(align=4), num_workers=workers)
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["attention_mask"], (batch["document_ids"] > 0).long())
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 0)


# Bookmarks


@pytest.mark.parametrize(
    "changes", [{}, {"wrap": False}, {"align": 4}, {"align": 4, "whole": True}], ids=str
)
@KINDS
def test_a_stream_goes_on_from_its_bookmarks_at_any_row(changes, text):
    given = text(**changes)
    rows = read(Stream(given, SEED), 0, 2000)
    stream, before = Stream(given, SEED), 0
    for at in (1, 47, 300, 301, 960, 1500):
        stream.read(range(before, at))
        before = at
        noted = streaming.to_text(stream.bookmarks(), "x")
        again = Stream(given, SEED, bookmarks=streaming.from_texts([noted], "x"))
        assert read(again, at, at + 200) == rows[at : at + 200]


@KINDS
def test_bookmarks_are_those_of_a_stream_that_went_on(text):
    """Saved right after going on: the same again, without a unit read."""
    stream = Stream(text(), SEED)
    stream.read(range(700))
    noted = streaming.to_text(stream.bookmarks(), "x")
    again = Stream(text(), SEED, bookmarks=streaming.from_texts([noted], "x"))
    assert streaming.to_text(again.bookmarks(), "x") == noted


@KINDS
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 4), (5, 2)])
def test_a_run_goes_on_on_other_devices(before, after, text):
    rows = read(Stream(text(), SEED), 0, 1600)
    noted = []
    for rank in range(before):
        stream = Stream(text(), SEED, lanes=streaming.lanes_of(rank, before))
        stream.read(range(rank, 960, before))
        noted.append(streaming.to_text(stream.bookmarks(), "x"))
    marks = streaming.from_texts(noted, "x")
    for rank in range(after):
        stream = Stream(text(), SEED, lanes=streaming.lanes_of(rank, after), bookmarks=marks)
        positions = range(960 + rank, 1600, after)
        assert stream.read(positions).ids.tolist() == [rows[p] for p in positions]


def test_of_two_bookmarks_of_a_lane_the_earlier_counts():
    noted = []
    for last in (48, 4800):
        stream = Stream(text(), SEED)
        stream.read(range(last))
        noted.append(streaming.to_text(stream.bookmarks(), "x"))
    for texts in (noted, noted[::-1]):
        assert streaming.to_text(streaming.from_texts(texts, "x"), "x") == noted[0]


def test_units_of_whole_documents_end_with_one():
    for anywhere in (True, False):
        units = streaming.units(text().parts, SEED, UnitStart(0, 0, 0, 0), anywhere=anywhere)
        ends = {unit.ends[-1] for unit in itertools.islice(units, 300)}
        assert ends == ({True, False} if anywhere else {True})


def test_going_on_reads_little():
    """The parts before the bookmark are not opened, the text of the lanes' units is tokenized
    again, and no more."""
    opened, tokenized = [], []

    def part(number):
        opened.append(number)
        return write(number, 200)

    def counting(texts):
        tokenized.append(sum(map(len, texts)))
        return encode(texts)

    readers = [lambda number=number: part(number) for number in range(30)]
    given = streamed_text(readers, encode=counting)
    stream = Stream(given, SEED)
    stream.read(range(10_000))
    marks = stream.bookmarks()
    before = len(opened), sum(tokenized)
    opened.clear()
    tokenized.clear()
    Stream(given, SEED, bookmarks=marks).row(10_000)
    assert len(opened) < 0.4 * before[0]
    assert sum(tokenized) <= 2 * streaming.UNIT_CHARACTERS


@pytest.mark.parametrize("texts", [["a"], ["ab", "c", "de"]])
def test_a_very_short_text_is_opened_once(texts):
    """Each unit holds its epochs by the hundred; the text is looked at once before."""
    opened = Counter()

    def part(number):
        opened[number] += 1
        yield Piece(texts[number], True, 1.0)

    readers = [lambda number=number: part(number) for number in range(len(texts))]
    stream = Stream(streamed_text(readers, row_format(align=4)), SEED)
    assert len(stream.read(range(100)).ids) == 100
    assert set(opened) == set(range(len(texts)))
    assert max(opened.values()) <= 2


def test_without_a_bookmark_the_text_is_read_again(caplog):
    rows = read(Stream(text(), SEED), 0, 500)
    assert read(Stream(text(), SEED), 400, 500) == rows[400:]
    data = module(text())
    data.start_at(400)
    with caplog.at_level("INFO", "bamdlm"):
        batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].tolist() == rows[400:404]
    assert "no bookmark: tokenizing the text up to example 400 again" in caplog.text


def test_bookmarks_of_another_text_are_not_used(caplog):
    stream = Stream(text(), SEED)
    stream.read(range(300))
    noted = streaming.to_text(stream.bookmarks(), text().fingerprint(SEED))
    assert streaming.from_texts([noted], text().fingerprint(SEED))
    assert not streaming.from_texts([noted], text().fingerprint(SEED + 1))
    assert "have changed since the checkpoint" in caplog.text


# What cannot be streamed


def test_a_text_of_less_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"has 2 tokens: not one row of model.length=8"):
        streamed_text([lambda: [Piece("ab", True, 1.0)]])


def test_windows_of_prepared_rows_are_refused(tmp_path):
    (tmp_path / "text8").write_text("a b c " * 100)
    wanted = Split(
        "text8-crop",
        "train",
        tokenizer=get_tokenizer("text8"),
        length=8,
        source=str(tmp_path / "text8"),
    )
    with pytest.raises(ValueError, match=r"streaming=True: text8-crop is windows of prepared"):
        streamed(wanted, tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_text_that_breaks_off_is_one_error(workers):
    def broken():
        yield from write(0, 200)
        raise ValueError("data: a.jsonl, line 201 is not JSON")

    given = streamed_text([broken])
    data = module(given, num_workers=workers)
    with pytest.raises(TextError, match="line 201 is not JSON"):
        [data.on_before_batch_transfer(batch, 0) for batch in data.train_dataloader()]


def test_ids_that_do_not_fit_are_one_error():
    given = text()
    given = streamed_text(given.parts, vocab_size=0x1100)
    with pytest.raises(TextError, match=r"gave the id \d+, but its vocabulary has 4352 ids"):
        read(Stream(given, SEED), 0, 200)


# From files, and whole runs


def lines(path, count, seed):
    pick = random.Random(seed)
    words = ["the", "license", "shall", "be", "provided", "under", "terms", "of", "this", "notice"]
    with path.open("w") as file:
        for _ in range(count):
            text = " ".join(pick.choices(words, k=pick.randrange(1, 30)))
            file.write(json.dumps({"text": text}) + "\n")


def test_files_of_a_corpus_are_its_parts(tmp_path):
    """The tokens of an epoch are those that are prepared."""
    for number in range(3):
        lines(tmp_path / f"{number}.jsonl", 60, number)
    settings = {"tokenizer": get_tokenizer(str(GOLDEN / "tokenizer")), "length": 16, "wrap": False}
    wanted = Split(str(tmp_path / "*.jsonl"), "train", **settings)
    given = streamed(wanted, tmp_path / "cache")
    assert len(given.parts) == 3
    found = read(Stream(given, SEED), 0, 4000)
    rows = get_rows(str(tmp_path / "*.jsonl"), "train", cache_dir=tmp_path / "cache", **settings)
    assert set(map(tuple, found)) == set(map(tuple, rows.ids.tolist()))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    yield from stand_in(tmp_path / "hub", monkeypatch, tmp_path / "home")


def test_openwebtext_is_streamed_from_the_hub_and_not_kept(hub, tmp_path):
    """Through the real clients; going on opens the files from the bookmark on."""
    repo, revision, files, _ = LAYOUTS["openwebtext"]
    for number, path in enumerate(files["train"]):
        content = [f"{number} {i} work of the license" for i in range(230)]
        put_table(hub.root, repo, revision, path, {"text": content})
    write_card(hub, repo, revision, card(("plain_text", {"train": "plain_text/train-*"})))
    settings = {"tokenizer": get_tokenizer(str(GOLDEN / "tokenizer")), "length": 16}
    given = streamed(Split("openwebtext", "train", **settings), tmp_path / "cache")
    assert len(given.parts) == 3
    rows = read(Stream(given, SEED), 0, 300)
    loaded = itertools.islice(module(given, length=16, num_workers=1).train_dataloader(), 75)
    assert [row for batch in loaded for row in batch["input_ids"].tolist()] == rows
    assert not list(tmp_path.glob("*/**/*.parquet.incomplete"))
    assert not [path for path in tmp_path.rglob("*.parquet") if hub.root not in path.parents]

    stream = Stream(given, SEED)
    stream.read(range(1400))
    marks = stream.bookmarks()
    start = min(mark.start for mark in marks.values())
    hub.asked.clear()
    assert read(Stream(given, SEED, bookmarks=marks), 1400, 1401) == read(stream, 1400, 1401)
    first = order(SEED, "parts", start.epoch, 3)[0]
    assert start.part > 0
    assert f"train-{first:05}-of-00003.parquet" not in hub.files()


def arguments(folder):
    lines(folder / "train-1.jsonl", 300, 1)
    lines(folder / "train-2.jsonl", 300, 2)
    return [
        *tiny(folder),
        f"data.train={folder}/train-*.jsonl",
        "data.streaming=True",
        "algo=bamdlm",
        "block_size=4",
    ]


def weights(folder):
    (path,) = folder.glob("outputs/*/*/checkpoints/last.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: tensor for name, tensor in state.items() if name.startswith("backbone")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(arguments, weights at the end) of a run on one device."""
    files, folder = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "UNIT_CHARACTERS", 2000)
        patch.chdir(folder)
        given = [*arguments(files), "model.dropout=0", "loader.num_workers=1"]
        code, said = run(given, folder / "log")
    assert code == 0, said
    assert not list(files.glob("cache/rows/train*"))
    return given, weights(folder)


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "UNIT_CHARACTERS", 2000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_killed_run_goes_on_with_the_rows_of_an_uninterrupted_one(uninterrupted, run_folder):
    given, whole = uninterrupted
    process = Run(given, run_folder / "log")
    while not list(run_folder.glob("outputs/*/*/checkpoints/step=4.ckpt")):
        assert process.poll() is None, process.text()
    process.send(9)
    assert process.wait() == -9
    code, said = run(given, run_folder / "log")
    assert code == 0, said
    assert "going on from step" in said
    assert "no bookmark" not in said
    found = weights(run_folder)
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, found[name]), name


def test_two_devices_train_on_the_rows_of_one(uninterrupted, run_folder):
    given, one = uninterrupted
    both = ranks(2, [*given, "trainer.devices=2"], run_folder / "log")
    assert finish(both) == [0, 0], both[0].text() + both[1].text()
    assert "no bookmark" not in both[1].text()  # a new run needs none
    two = weights(run_folder)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-6)


def test_devices_that_read_files_of_their_own_train_as_one(run_folder, monkeypatch):
    """Two processes, of which one is killed in between; 48 files."""
    monkeypatch.setattr(streaming, "UNIT_CHARACTERS", 500)
    for number in range(3, 49):
        lines(run_folder / f"train-{number}.jsonl", 30, number)
    given = [*arguments(run_folder), "data.stream_by=files", "model.dropout=0"]
    code, said = run([*given, "checkpointing.save_dir=outputs/a/one"], run_folder / "log")
    assert code == 0, said
    one = weights(run_folder)
    shutil.rmtree(run_folder / "outputs")
    given += ["trainer.devices=2", "checkpointing.save_dir=outputs/a/two"]
    both = ranks(2, given, run_folder / "log")
    while not list(run_folder.glob("outputs/*/*/checkpoints/step=4.ckpt")):
        assert both[0].poll() is None, both[0].text()
    both[1].send(9)
    finish(both)
    both = ranks(2, given, run_folder / "log")
    assert finish(both) == [0, 0], both[0].text() + both[1].text()
    assert "no bookmark" not in both[0].text()
    two = weights(run_folder)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-6)


def test_a_bad_line_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "UNIT_CHARACTERS", 2000)
    monkeypatch.chdir(tmp_path)
    given = arguments(tmp_path)
    with (tmp_path / "train-2.jsonl").open("a") as file:
        file.write("{\n")
    code, said = run([*given, "loader.num_workers=1"], tmp_path / "log")
    assert code == 1
    assert "train-2.jsonl, line 301 is not JSON" in said
    assert "Traceback" not in said
