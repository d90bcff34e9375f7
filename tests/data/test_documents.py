"""data.pack=documents from text to batch: where documents lie in rows, and what is refused.

What the losses make of it: test_document_losses.py.
"""

import json
import pickle
import random

import numpy as np
import pytest
from conftest import GOLDEN
from hub_tools import get_rows
from runs import tiny

import main
import settings
from data import packing, shards, token_rows
from data.packing import RowFormat, Tokens
from data.preparation import CutDocuments
from data.tokenizer import get_tokenizer
from dataloader import DataModule
from modes.build_data import alignment

BOS, EOS, PAD = 1, 2, 0


def row_format(length=8, align=4, *, eos=True, special=False, **more):
    return RowFormat(length, True, eos, special, bos=BOS, eos=EOS, pad=PAD, align=align, **more)


def rows_of(pieces, how):
    """(ids, document_ids) of all rows, as arrays."""
    chunks = list(packing.packed([Tokens.of(*zip(*pieces, strict=True))], how))
    for chunk in chunks:
        found = packing.document_ids(chunk.marks, how.length)
        assert (chunk.counts == (found > 0).sum(1)).all()
    ids = np.concatenate([chunk.ids for chunk in chunks])
    return ids, np.concatenate([packing.document_ids(chunk.marks, how.length) for chunk in chunks])


def whole(documents):
    return [(ids, True) for ids in documents]


def test_documents_begin_at_blocks_and_go_on_in_the_next_row():
    ids, document_ids = rows_of(whole([[5, 6, 7, 8], [9], [3] * 6, []]), row_format())
    assert ids.tolist() == [[5, 6, 7, 8, 2, 0, 0, 0], [9, 2, 0, 0, 3, 3, 3, 3], [3, 3, 2] + [0] * 5]
    assert document_ids.tolist() == [
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 2, 2, 2, 2],
        [1, 1, 1, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize(
    ("eos", "special", "wanted"),
    [
        (True, True, [1, 5, 2, 1, 6, 7, 2, 0]),
        (False, True, [1, 5, 2, 1, 6, 7, 2, 0]),
        (True, False, [5, 2, 6, 7, 2, 0, 0, 0]),
        (False, False, [5, 6, 7, 0, 0, 0, 0, 0]),
    ],
)
def test_the_ends_of_documents(eos, special, wanted):
    """With insert_special a document has BOS and EOS round it; EOS never comes twice."""
    ids, _ = rows_of(whole([[5], [6, 7]]), row_format(align=1, eos=eos, special=special))
    assert ids.tolist() == [wanted]


@pytest.mark.parametrize("align", [1, 2, 3, 12])
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_every_document_can_be_read_back(align, at_once, monkeypatch):
    """Random documents in random pieces; nothing is dropped, nothing depends on the batches."""
    monkeypatch.setattr(packing, "PIECES_AT_ONCE", at_once)
    documents = random_documents(align)
    ids, document_ids = rows_of(in_pieces(documents, align), row_format(12, align))
    found, open_end = [], []
    for row, numbers in zip(ids, document_ids, strict=True):
        for number in range(1, numbers.max() + 1):
            places = np.flatnonzero(numbers == number)
            assert (np.diff(places) == 1).all()
            assert places[0] % align == 0
            open_end += row[places].tolist()
            if open_end[-1] == EOS:
                found.append(open_end[:-1])
                open_end = []
    assert not open_end
    assert found == [document for document in documents if document]
    gaps = (document_ids == 0)[:-1].sum() + (document_ids[-1] == 0).sum()
    assert (ids[document_ids == 0] == PAD).all()
    if align == 1:
        assert gaps == (document_ids[-1] == 0).sum()


def random_documents(seed, count=60, sizes=(0, 1, 5, 12, 40)):
    chance = random.Random(seed)
    return [[chance.randrange(3, 90) for _ in range(chance.choice(sizes))] for _ in range(count)]


def in_pieces(documents, seed):
    """(ids, ends) of each piece; every document is cut in two somewhere."""
    chance, pieces = random.Random(seed), []
    for document in documents:
        cut = chance.randrange(len(document) + 1)
        pieces += [(document[:cut], False), (document[cut:], True)]
    return pieces


# ---- none is cut that fits --------------------------------------------------------------------


def test_whole_documents_go_where_they_fit_best():
    """The longest first, each into the fullest row that has room; rows in the order of the text."""
    documents = [[5] * 3, [6] * 6, [7], [8] * 4, [9] * 10]  # and EOS behind each
    ids, document_ids = rows_of(whole(documents), row_format(align=1, whole=True))
    assert ids.tolist() == [
        [5, 5, 5, 2, 7, 2, 0, 0],
        [6, 6, 6, 6, 6, 6, 2, 0],
        [8, 8, 8, 8, 2, 9, 9, 2],
        [9] * 8,
    ]
    assert document_ids[0].tolist() == [1, 1, 1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize("align", [1, 2, 3, 12])
@pytest.mark.parametrize(("special", "at_once"), [(False, 1), (True, 1 << 18)])
def test_only_documents_longer_than_a_row_are_cut(align, special, at_once, monkeypatch):
    monkeypatch.setattr(packing, "IDS_AT_ONCE", at_once)
    monkeypatch.setattr(packing, "ROWS_AT_ONCE", 2)
    documents = random_documents(align)
    how = row_format(12, align, special=special, whole=True)
    ids, document_ids = rows_of(in_pieces(documents, align), how)
    found = []
    for row, numbers in zip(ids, document_ids, strict=True):
        for number in range(1, numbers.max() + 1):
            places = np.flatnonzero(numbers == number)
            assert places[0] % align == 0
            assert (np.diff(places) == 1).all()
            found.append(row[places].tolist())
    wanted = []
    for document in filter(None, documents):
        framed = [BOS] * special + document + [EOS]
        wanted += [framed[i : i + 12] for i in range(0, len(framed), 12)]
    assert sorted(found) == sorted(wanted)
    assert (ids[document_ids == 0] == PAD).all()


def test_short_documents_leave_little_room():
    """Lengths like those of molecules: at most 2 % more rows than blocks of text fill."""
    documents = random_documents(0, count=3000, sizes=range(10, 70))
    _, document_ids = rows_of(whole(documents), row_format(128, 8, whole=True))
    blocks = sum(-(-(len(document) + 1) // 8) for document in documents)
    assert len(document_ids) <= 1.02 * blocks / 16


@pytest.mark.parametrize("pack", ["wrap", "documents", "whole", "rows"])
@pytest.mark.parametrize(("eos", "special"), [(False, False), (True, False), (True, True)])
def test_cut_documents_are_counted(pack, eos, special):
    """Against the rows themselves, in which every document has an id of its own."""
    documents = [[10 + number] * (number * 7 % 23) for number in range(80)] + [[90] * 40]
    how = RowFormat(
        *(12, pack != "rows", eos, special),
        **{"bos": BOS, "eos": EOS, "pad": PAD, "whole": pack == "whole"},
        align=3 if pack in ("documents", "whole") else None,
    )
    pieces = in_pieces(documents, 3)
    parts = [Tokens.of(*zip(*pieces, strict=True))]
    rows = np.concatenate([chunk.ids for chunk in packing.packed(parts, how)])
    bodies = (rows[:, 1:-1] if how.framed else rows).tolist()
    cut = 0
    for document in filter(None, documents):
        holders = [body for body in bodies if document[0] in body]
        end = len(holders[0]) - holders[0][::-1].index(document[0])
        no_room_for_eos = eos and pack != "rows" and end == len(holders[0])
        seen = holders[0].count(document[0])
        cut += len(holders) > 1 or seen < len(document) or no_room_for_eos
    counter = CutDocuments(how)
    for part in (pieces[:31], pieces[31:32], pieces[32:]):
        lengths, ends = zip(*((len(ids), ends) for ids, ends in part), strict=True)
        counter.add(np.array(lengths), np.array(ends))
    assert counter.count == cut


@pytest.mark.parametrize(("length", "wrap", "align"), [(8, True, 3), (8, False, 4)])
def test_shapes_that_contradict_themselves_are_refused(length, wrap, align):
    with pytest.raises(ValueError, match="documents cannot be kept apart"):
        RowFormat(length, wrap, True, True, bos=BOS, eos=EOS, pad=PAD, align=align)


# ---- the prepared folder ----------------------------------------------------------------------


@pytest.fixture
def prepare(tmp_path):
    path = tmp_path / "some.jsonl"
    texts = ["the license", "the work shall be provided " * 9, "be", ""]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = get_tokenizer(str(GOLDEN / "tokenizer"))

    def make(align=4, **more):
        return get_rows(
            *(str(path), "train"),
            **{"tokenizer": tokenizer, "cache_dir": tmp_path / "cache"} | more,
            length=16,
            align=align,
        )

    return make


def test_batches_tell_documents_apart(prepare):
    made = pickle.loads(pickle.dumps(prepare()))
    data = DataModule(train=made, valid=made, length=16, batch_size=2, eval_batch_size=len(made))
    for batch in (next(iter(data.val_dataloader())), next(iter(data.train_dataloader()))):
        assert set(batch) == {"input_ids", "attention_mask", "row", "document_ids"}
        assert (batch["attention_mask"] == (batch["document_ids"] > 0)).all()
        assert batch["document_ids"].dtype == batch["input_ids"].dtype
    whole = next(iter(data.val_dataloader()))
    real = whole["input_ids"][whole["attention_mask"] > 0]
    assert made.about["documents"] == 4
    assert len(real) == made.about["tokens"] + 2 * 3  # BOS and EOS of all but the empty one
    assert made.counts.sum() == len(real)


def test_rows_of_one_text_carry_no_document_ids(prepare):
    made = prepare(align=None)
    data = DataModule(train=None, valid=made, length=16, batch_size=1, eval_batch_size=1)
    assert "document_ids" not in next(iter(data.val_dataloader()))
    assert sorted(path.name for path in made.folder.glob("*.bin")) == ["counts.bin", "ids.bin"]


def test_processes_change_nothing(prepare, monkeypatch, tmp_path):
    alone = prepare()
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 20)
    several = prepare(cache_dir=tmp_path / "other", processes=2)
    assert several.folder != alone.folder
    for name in ("ids.bin", "marks.bin", "counts.bin"):
        assert (several.folder / name).read_bytes() == (alone.folder / name).read_bytes()


def test_a_process_that_meets_an_unknown_character_says_which(prepare, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 20)
    letters = get_tokenizer("characters:abcdefghijklmnopqrst uv")
    with pytest.raises(ValueError, match=r"'w' .* is not among the 23 .*text that begins 'the w"):
        prepare(tokenizer=letters, processes=2)


def test_each_alignment_has_its_folder_and_wrapped_rows_keep_theirs(prepare):
    folders = {prepare(align=align).folder for align in (None, 1, 4, 8)}
    folders.add(prepare(whole=True).folder)
    assert len(folders) == 5
    assert set(prepare(align=None).about["shape"]) == {
        *("length", "wrap", "insert_eos", "insert_special", "bos", "eos", "pad")
    }


def test_a_damaged_array_of_marks_is_refused(prepare):
    made = prepare()
    with (made.folder / "marks.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"marks.bin has .* bytes, .* delete the folder"):
        token_rows.TokenRows(made.folder)


# ---- settings ---------------------------------------------------------------------------------


def composed(*overrides):
    return settings.load(["data=files", "data.pack=documents", *overrides])


def problems(*overrides):
    return [p for p in settings.check(composed(*overrides))[0] if "documents" in p]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["algo=bamdlm", "block_size=16"], 16),
        (["algo=bamdlm"], 1),  # one block as long as the row
        (["algo=mdlm"], 1),
        (["algo=sedd"], 1),
        (["algo=ar"], 1),
        (["data.pack=whole", "block_size=16"], 16),
        (["data.pack=wrap", "block_size=16"], None),
        (["training.block_sizes={4: 1, 6: 1}", "model.length=24", "block_size=4"], 12),
        (["training.block_sizes={4: 1, 24: 1}", "model.length=24", "block_size=24"], 4),
        (["mode=ppl_eval", "training.block_sizes={4: 1, 16: 1}", "block_size=4"], 4),
        (["mode=ppl_eval", "eval.block_sizes={4: 1, 16: 1}"], 16),
    ],
)
def test_documents_begin_at_blocks_where_there_are_any(overrides, wanted):
    assert alignment(composed(*overrides)) == wanted


def test_documents_in_rows_of_their_own_cannot_be_packed():
    (problem,) = problems("data.wrap=false")
    assert "data.wrap=False" in problem
    assert "choose one" in problem


def test_windows_of_one_document_cannot_be_packed(tmp_path):
    (problem,) = problems("data=text8-crop")
    assert "data.train=text8-crop" in problem
    assert problem.endswith("use data=text8 or data.pack=wrap")
    assert problems("data=text8-crop", "mode=ppl_eval") == []
    with pytest.raises(ValueError, match="documents cannot be kept apart in text8-crop"):
        get_rows(
            *("text8-crop", "train"),
            tokenizer=get_tokenizer("text8"),
            length=16,
            cache_dir=tmp_path,
            align=1,
        )


def test_flash_attention_has_no_document_ids(monkeypatch):
    assert any("flash_attn cannot keep" in p for p in problems("model.attn_backend=flash_attn"))
    for name in ("settings.defaults", "settings.rules.machine"):
        monkeypatch.setattr(f"{name}.visible_gpus", lambda: 1)
        monkeypatch.setattr(f"{name}.has_package", lambda name: True)
    for pack in ("documents", "whole"):
        assert composed("algo=mdlm", f"data.pack={pack}").model.attn_backend == "sdpa"
    assert composed("algo=mdlm", "data.pack=wrap").model.attn_backend == "flash_attn"


def test_an_end_that_is_there_anyway_is_told():
    _, warnings = settings.check(composed("data.insert_valid_eos=false"))
    wanted = "data.insert_valid_eos=False has no effect: data.insert_valid_special puts EOS"
    assert any(wanted in warning for warning in warnings)
    _, warnings = settings.check(composed("data.insert_valid_eos=false", "data.pack=wrap"))
    assert not any("insert_valid_eos" in warning for warning in warnings)


def test_an_unknown_way_of_packing_is_refused():
    found, _ = settings.check(settings.load(["data.pack=document"]))
    assert any(
        "data.pack=document must be one of wrap, documents, whole" in problem for problem in found
    )


# ---- a run ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_launch_folder")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("algo", "pack"),
    [(["algo=bamdlm", "block_size=4"], "documents"), (["algo=ar"], "whole")],
    ids=["bamdlm-documents", "ar-whole"],
)
def test_training_and_perplexity_count_real_tokens_alone(algo, pack, tmp_path, capsys):
    """Both predict all but the first token of every segment."""
    texts = ["abc", "a longer text of several rows", "x", "", "to be"]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    words = [
        *(*tiny(tmp_path), *algo, f"data.pack={pack}", "trainer.max_steps=2"),
        *(f"data.train={path}", f"data.valid={path}", f"checkpointing.save_dir={tmp_path}/run"),
    ]
    assert main.main(words) == 0
    assert (
        main.main([*words, "mode=ppl_eval", "eval.checkpoint_path=run/checkpoints/last.ckpt"]) == 0
    )
    (summary,) = (tmp_path / "run").glob("ppl_*.json")
    found = json.loads(summary.read_text())
    real = sum(len(text) + 2 for text in texts if text)
    prepared = {p.parent.name: token_rows.TokenRows(p.parent) for p in tmp_path.rglob("marks.bin")}
    (valid,) = [made for name, made in prepared.items() if "-valid-" in name]
    firsts = valid.document_ids(range(len(valid))).max(1).sum()
    assert found["tokens"] == real - firsts
    about = valid.about
    assert about["padding"] == pytest.approx(1 - real / (len(valid) * valid.length), abs=1e-6)
    assert about["cut_documents"] == (1 if pack == "whole" else about["cut_documents"])
    capsys.readouterr()
    assert main.main([*words, "mode=prepare"]) == 0
    packed = f"({about['padding']:.2%} padding, {about['cut_documents']} documents cut; "
    assert f"{len(valid)} rows of {valid.length} {packed}" in capsys.readouterr().out
