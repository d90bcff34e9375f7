"""scripts/show_batch.py: rows as text, figures of the data, what it refuses."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from runs import tiny

from data.tokenizer import get_tokenizer
from scripts import show_batch

TEXTS = ["abc", "a longer text of several rows", "", "to be or not to be"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Overrides for own files of four documents; and an empty launch folder."""
    monkeypatch.chdir(tmp_path)
    Path("docs.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return [*tiny(tmp_path), "data.train=docs.jsonl", "data.valid=docs.jsonl", "block_size=4"]


def shown(words, capsys, *options):
    assert show_batch.main([*words, *options]) == 0
    return capsys.readouterr().out


def painted(ids, mask=None, document_ids=None, *, terminal=False):
    """Lines as they are printed. Letters of text8 are 8 (a), 9 ..., its [EOS] is 3."""
    painter = show_batch.Painter(get_tokenizer("text8"), block_size=4)
    mask = [1] * len(ids) if mask is None else mask
    document_ids = None if document_ids is None else np.array(document_ids)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False)
    for line in painter.lines(np.array(ids), np.array(mask), document_ids):
        console.print(line)
    return console.file.getvalue().splitlines()


def test_a_row_has_its_blocks_and_special_tokens():
    assert painted([2, 8, 9, 10, 8, 8, 3, 9]) == ["[BOS]abc│aa[EOS]b"]


def test_each_document_has_its_line_and_padding_shows():
    ids, mask = [8, 9, 3, 5, 10, 10, 10, 10, 10, 5, 5, 5], [1, 1, 1, 0] + [1] * 5 + [0] * 3
    document_ids = [1, 1, 1, 0, 2, 2, 2, 2, 2, 0, 0, 0]
    assert painted(ids, mask, document_ids) == ["[document 1] ab[EOS]▒", "[document 2] cccc│c▒▒▒"]


def test_a_terminal_gets_colours_that_alternate():
    (line,) = painted([8, 8, 8, 8, 9, 9, 3, 9], terminal=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", line) == "aaaa│bb[EOS]b"
    assert "\x1b[36mbb" in line
    assert "\x1b[36maaaa" not in line


def test_text_cannot_steer_the_terminal():
    assert show_batch.printable("a\x1b[2J\nb\tc é漢") == "a\\x1b[2J↵b⇥c é漢"


def test_it_shows_what_training_sees(words, capsys):
    """Plain text where there is no terminal."""
    out = shown([*words, "data.pack=documents"], capsys, "--rows", "9")
    assert "\x1b" not in out
    assert "[document 1] [BOS]abc│[EOS]▒▒▒\n" in out
    assert "[document 2] [BOS]a l│onge\n" in out
    assert "rows: 4 read" in out  # each once, though they come again for those shown
    prepared = sum(len(text) for text in TEXTS)
    assert f"docs.jsonl (train): 4 documents, {prepared} tokens" in out
    assert f"documents: 4 read, of 0 to 29 tokens, median 3; {1:.2f} bytes per token" in out


def test_figures_count_real_tokens_and_padding(words, capsys):
    out = shown(
        [*words, "data.pack=documents", "loader.eval_batch_size=100"], capsys, "--split", "valid"
    )
    real = sum(len(text) + 2 for text in TEXTS if text)
    places = sum(-(-(len(text) + 2) // 4) * 4 for text in TEXTS if text)
    places = -(-places // 16) * 16
    assert f"{places // 16} read with {real} tokens, {6 / real:.1%} of them BOS and EOS" in out
    assert f"{1 - real / places:.1%} of the rows is padding" in out


def test_unknown_tokens_and_rows_of_their_own(words, capsys):
    Path("docs.jsonl").write_text(json.dumps({"text": "ab12"}) + "\n")
    out = shown([*words, "data.wrap=false"], capsys, "--rows", "1", "--tokens", "1")
    assert "[BOS]ab[UNK]│[UNK][EOS]▒▒│▒▒▒▒│▒▒▒▒" in out
    assert "33.33% unknown" in out


def test_later_batches_and_the_histogram(words, capsys):
    out = shown(words, capsys, "--batch", "2", "--rows", "1", "--histogram", "lengths.png")
    assert "row 8" in out
    assert Path("lengths.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path.cwd().glob("*.tmp.png"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch", "-1"], "--batch -1 must not be negative"),
        (["--histogram", "a.pdf"], "a.pdf must end in .png"),
        (["--histogram", "no/a.png"], "the folder does not exist"),
        (["--split", "test"], "invalid choice"),
        (["data.train=absent.txt"], "data.train=absent.txt does not exist"),
        (["data.pakc=documents"], "Did you mean data.pack?"),
        (["--split", "valid", "--batch", "99"], "--batch 99: the split has fewer batches"),
        (["data.tokenizer_name_or_path=characters:abc"], "' ' (U+0020) is not among the 3"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_bad_input_is_named(words, change, message, capsys):
    try:
        code = show_batch.main([*words, *change])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_rows_show_the_blocks_of_their_step(words, capsys):
    grows = ["training.block_schedule={0: 1, 1: 4}", "block_size=4", "loader.global_batch_size=4"]
    text = shown([*words, *grows], capsys, "--rows", "5")
    sizes = re.findall(r"row (\d), blocks of (\d+)", text)
    assert [int(size) for _, size in sizes] == [1, 1, 1, 1, 4]


def test_rows_of_several_block_sizes_show_their_own(words, capsys):
    """Eight rows of a step: two of blocks of one, which have no borders, four of 4, two of 16."""
    sizes = ["training.block_sizes={1: 1, 4: 2, 16: 1}", "loader.num_workers=0"]
    text = shown([*words, *sizes], capsys, "--rows", "8")
    found = re.findall(r"row (\d), blocks of (\d+)\n(.*)", text)
    assert sorted(int(size) for _, size, _ in found) == [1, 1, 4, 4, 4, 4, 16, 16]
    for _, size, line in found:
        assert line.count("│") == (3 if size == "4" else 0)
    assert "blocks of" not in shown([*words, *sizes], capsys, "--split", "valid")
