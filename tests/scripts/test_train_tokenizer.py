"""Tokenizers of one's own text: scripts/train_tokenizer.py, and sets of characters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN

import settings
from data import vocabularies
from data.tokenizer import get_tokenizer
from scripts import train_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = "the king said that the queen and the king were in the garden of the queen\n"


@pytest.fixture
def files(tmp_path):
    """A pattern of two .jsonl files."""
    for number in range(2):
        lines = [json.dumps({"text": WORDS * 5 + f"café {number} {i}"}) for i in range(20)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "*.jsonl")


def trained(tmp_path, *words, name="made"):
    assert train_tokenizer.main([*words, "--out", str(tmp_path / name)]) == 0
    return get_tokenizer(str(tmp_path / name))


def test_a_bpe_of_own_files_follows_the_rules_of_the_specification(files, tmp_path, capsys):
    """V is one more than its ids, the mask the last; documents end and begin with <|endoftext|>."""
    made = trained(tmp_path, "--files", files, "--vocab_size", "300")
    assert (len(made.hf), made.vocab_size, made.mask_id, made.pad_id) == (300, 301, 300, 300)
    assert made.bos_id == made.eos_id == 299
    assert made.encode("<|endoftext|>") == [299]
    assert made.hf.vocab_size == 300  # as with GPT-2, <|endoftext|> counts
    unseen = "Übung: 漢字 🙂 the king"
    assert made.decode(made.encode(unseen)) == unseen
    assert len(made.encode(WORDS)) < len(WORDS) / 2
    said = capsys.readouterr().out
    assert "vocabulary 301: 300 ids, then the mask (300)" in said
    assert f"data.tokenizer_name_or_path={tmp_path / 'made'}" in said
    assert "bytes per token" in said


def test_the_same_text_gives_the_same_folder_in_another_process(files, tmp_path):
    words = ["--files", files, "--vocab_size", "300"]
    here = trained(tmp_path, *words)
    subprocess.run(
        [sys.executable, "scripts/train_tokenizer.py", *words, "--out", str(tmp_path / "other")],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"},
        check=True,
        capture_output=True,
    )
    for path in (tmp_path / "made").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    assert get_tokenizer(str(tmp_path / "other")).fingerprint == here.fingerprint


def test_a_short_text_gives_fewer_ids_and_says_so(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc abc")
    made = trained(tmp_path, "--files", str(tmp_path / "a.txt"), "--vocab_size", "5000")
    assert len(made.hf) < 270
    assert f"the text gives {len(made.hf)} ids, not --vocab_size 5000" in capsys.readouterr().out


def test_a_named_corpus_is_read_and_detokenized_as_for_training(tmp_path, monkeypatch):
    """data=… of main.py: the corpus's own column, source and detokenizer."""
    folder = tmp_path / "ptb"
    folder.mkdir()
    line = json.dumps({"sentence": "he did n't say <unk> N times"})
    (folder / "train.jsonl").write_text("\n".join([line] * 3))
    seen = []
    monkeypatch.setattr(
        train_tokenizer.vocabularies,
        "train_bpe",
        lambda texts, size, **_: seen.extend(texts) or vocabularies.character_set("abc"),
    )
    monkeypatch.setattr(train_tokenizer.tokenizer.Tokenizer, "encode", lambda *_: [0])
    trained(tmp_path, "data=ptb", f"data.source={folder}", "--vocab_size", "300")
    from data.detokenizers import detokenize

    assert seen == [detokenize("ptb", "he did n't say <unk> N times")] * 3


def test_several_patterns_and_a_column(tmp_path):
    for number in range(2):
        line = json.dumps({"story": "AB"[number] * 3})
        (tmp_path / f"{number}.jsonl").write_text(line)
    patterns = [str(tmp_path / f"{number}.jsonl") for number in range(2)]
    made = trained(tmp_path, "data.text_column=story", "--characters", "--files", *patterns)
    assert made.hf.get_vocab() == {"A": 0, "B": 1, "<|endoftext|>": 2}


REFUSED = {
    "no text": (["--vocab_size", "300"], "data.train is not set"),
    "no size": (["--files", "a.txt"], "--vocab_size is missing"),
    "too small": (["--files", "a.txt", "--vocab_size", "256"], "--vocab_size 256 must be from 257"),
    "both": (["--files", "a.txt", "--characters", "--vocab_size", "300"], "has no meaning with"),
    "two texts": (["--files", "a.txt", "data.train=a.txt", "--characters"], "both name text"),
    "conversations": (
        ["data=chat", "data.train=a.txt", "--characters"],
        "data.format=chat: a tokenizer is trained on text",
    ),
    "absent": (["--files", "absent.txt", "--characters"], "absent.txt"),
    "bad JSON": (["--files", "bad.jsonl", "--vocab_size", "300"], "bad.jsonl, line 2 is not JSON"),
    "empty": (["--files", "empty.jsonl", "--vocab_size", "300"], "every document is empty"),
    "no characters": (["--files", "empty.jsonl", "--characters"], "every document is empty"),
    "no setting": (["data.trian=a.txt", "--characters"], "data.trian is not a setting"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_named_and_leaves_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("abc")
    Path("bad.jsonl").write_text('{"text": "a"}\n{bad')
    Path("empty.jsonl").write_text('{"text": ""}\n')
    before = sorted(tmp_path.iterdir())
    assert train_tokenizer.main([*words, "--out", "new"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_exists_is_not_written_over(files, tmp_path, capsys):
    (tmp_path / "made").mkdir()
    words = ["--files", files, "--vocab_size", "300", "--out", str(tmp_path / "made")]
    assert train_tokenizer.main(words) == 2
    assert "made exists: name a new folder, or remove it" in capsys.readouterr().err
    assert not list((tmp_path / "made").iterdir())


def test_tokenizers_made_before_are_the_same_to_caches_and_checkpoints(tmp_path):
    """In older ones <|endoftext|> is an added token that the model's own vocabulary lacks."""
    vocabularies.train_bpe([WORDS], 270).save_pretrained(str(tmp_path / "new"))
    vocabularies.character_set("ACGT").save_pretrained(str(tmp_path / "letters"))
    for name in ("new", "letters"):
        made = get_tokenizer(str(tmp_path / name))
        saved = json.loads((tmp_path / name / "tokenizer.json").read_text())
        assert saved["model"]["vocab"].pop("<|endoftext|>") == made.eos_id
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(saved))
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        del config[vocabularies.END_INSIDE]
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        old = get_tokenizer(str(tmp_path / name))
        assert (old.hf.vocab_size, made.hf.vocab_size) == (made.eos_id, made.eos_id + 1)
        assert [old.vocab_size, old.mask_id, old.eos_id] == [
            *(made.vocab_size, made.mask_id, made.eos_id)
        ]
        assert old.fingerprint == made.fingerprint
    assert old.encode("GATT<|endoftext|>") == made.encode("GATT<|endoftext|>") == [2, 0, 3, 3, 4]
    recorded = {"characters": "d4f18336ef85d341", "characters:ACGT": "314e8947de36e0ea"}
    for name, fingerprint in recorded.items():  # of the code before
        assert get_tokenizer(name).fingerprint == fingerprint


# ---- sets of characters -----------------------------------------------------------------------


def test_an_alphabet_is_given_by_its_characters():
    made = get_tokenizer("characters:ACGT")
    assert (made.vocab_size, made.mask_id, made.bos_id, made.eos_id, made.pad_id) == (6, 5, 4, 4, 5)
    assert made.encode("GATTACA") == [2, 0, 3, 3, 0, 1, 0]
    assert made.decode([2, 0, 5, 4]) == "GA[MASK]<|endoftext|>"
    assert get_tokenizer("characters:ACGTA").fingerprint == made.fingerprint


def test_characters_alone_are_the_printable_ones():
    made = get_tokenizer("characters")
    molecules = "C[C@@H](N)C(=O)O\nc1ccc2c(c1)[nH]cc2\tF/C=C\\F"
    assert made.decode(made.encode(molecules)) == molecules
    assert len(made.encode(molecules)) == len(molecules)
    assert made.vocab_size == 97 + 2


@pytest.mark.parametrize("saved", [False, True], ids=["named", "saved"])
def test_a_character_outside_the_alphabet_is_named_with_its_place(saved, tmp_path):
    made = get_tokenizer("characters:ACGT")
    if saved:
        made.save(tmp_path)
        made = get_tokenizer(str(tmp_path))
        assert made.fingerprint == get_tokenizer("characters:ACGT").fingerprint
    with pytest.raises(ValueError, match=r"'N' \(U\+004E\) is not among the 4 .*after 'GATT'"):
        made.encode_batch(["ACGT", "GATTNACA"])


def test_other_errors_of_a_tokenizer_are_not_taken_for_that():
    """A vocabulary of words without an unknown one."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    from data.tokenizer import wrap

    backend = Backend(models.WordLevel({"to": 0, "be": 1}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = wrap(vocabularies.ended(backend), "words")
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        words.encode("to be or not")


def test_an_alphabet_without_a_character_is_refused():
    with pytest.raises(ValueError, match=r"names no character; .* as in characters:ACGT"):
        get_tokenizer("characters:")


@pytest.mark.parametrize("alphabet", ["ACGT", "()[]=#@+-$,:{}", " \n"])
def test_an_alphabet_is_taken_from_the_command_line_as_it_stands(alphabet):
    words = [f"data.train={GOLDEN}/x.txt", f"data.tokenizer_name_or_path=characters:{alphabet}"]
    made, problems, _ = settings.examine(["data=files", *words])
    assert made.data.tokenizer_name_or_path == f"characters:{alphabet}"
    assert not [problem for problem in problems if "tokenizer" in problem]


def test_the_short_word_tokenizer_is_explained():
    _, problems, _ = settings.examine(["tokenizer=characters"])
    assert "tokenizer does not exist: use data.tokenizer_name_or_path" in problems
