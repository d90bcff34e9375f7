"""One table from several checkpoints and corpora."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import ALGORITHMS, tiny, write_text

import main
from scripts import evaluate_all


@pytest.mark.usefixtures("_launch_folder")
def test_the_table_has_every_corpus_model_and_likelihood(tmp_path, capsys, monkeypatch):
    def in_this_process(command, check):
        return SimpleNamespace(returncode=main.main(command[2:]))

    monkeypatch.setattr(evaluate_all.subprocess, "run", in_this_process)
    base = tiny(tmp_path)
    files = []
    for algo in ("bamdlm", "ar"):
        words = [w for w in (*base, *ALGORITHMS[algo]) if "clip_search" not in w]
        words += ["trainer.max_steps=2", "trainer.limit_val_batches=0"]
        words += ["callbacks.checkpoint_monitor=null"]
        folder = tmp_path / algo
        assert main.main([*words, f"checkpointing.save_dir={folder}"]) == 0
        files.append(str(folder / "checkpoints" / "last.ckpt"))
    one = next(w for w in base if w.startswith("data.valid=")).partition("=")[2]
    two = str(write_text(tmp_path / "other.txt", 70, 3))
    shared = [
        w for w in base if w.startswith(("data.cache_dir", "data=", "trainer.acc", "loader."))
    ]
    arguments = [*files, "--data", f"{one},{two}", "--likelihood", "counts,exact"]
    arguments += ["--out", str(tmp_path / "table"), "--", *shared]
    assert evaluate_all.main(arguments) == 0
    said = capsys.readouterr().out
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2
    assert {(r["corpus"], r["model"], r["likelihood"]) for r in rows} == {
        (corpus, model, name)
        for corpus in (one, two)
        for model in files
        for name in ("counts", "exact")
    }
    for row in rows:
        assert float(row["ppl"]) > 1
        # a token of text8 is a byte; the first of each row is not scored
        per_token = math.log2(float(row["ppl"]))
        assert float(row["bits_per_byte"]) == pytest.approx(per_token, rel=0.15)
    markdown = (tmp_path / "table.md").read_text().splitlines()
    assert len(markdown) == 2 + len(rows)
    assert (tmp_path / "table.txt").read_text().strip() in said
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "table.runs").rglob("ppl_*.json")}
    assert len(stamps) == 4
    assert evaluate_all.main(arguments) == 0  # nothing is measured again
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Corpora by name that were measured; `no.txt` fails. Nothing but the script itself runs."""
    seen = []

    def run(command, check):
        words = dict(word.split("=", 1) for word in command[2:])
        corpus, folder = words["data.valid"], Path(words["checkpointing.save_dir"])
        seen.append(corpus)
        if corpus.endswith("no.txt"):
            return SimpleNamespace(returncode=1)
        folder.mkdir(parents=True)
        entry = {"likelihood": "counts", "ppl": float(len(seen)), "nll": 1.0, "tokens": 1}
        (folder / "ppl_x.json").write_text(json.dumps(entry | {"rows": 1, "ppl_error": None}))
        return SimpleNamespace(returncode=0)

    def read(name):
        if name == "absent.ckpt":
            raise ValueError("absent.ckpt does not\x1b exist")
        return SimpleNamespace(fingerprint="0" * 64)

    monkeypatch.setattr(evaluate_all.subprocess, "run", run)
    monkeypatch.setattr(evaluate_all, "read_checkpoint", read)
    monkeypatch.setattr(evaluate_all, "model_words", lambda *asked: ["algo=ar"])
    monkeypatch.setattr(evaluate_all, "bytes_per_row", lambda words: 1.0)
    return seen


def test_other_settings_and_files_of_the_same_name_are_measured_anew(measured, tmp_path):
    words = ["a.ckpt", "--data", "one/a.txt,two/a.txt", "--out", str(tmp_path / "table"), "--"]
    assert evaluate_all.main(words) == 0
    assert measured == ["one/a.txt", "two/a.txt"]
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [row["ppl"] for row in csv.DictReader(file)] == ["1.0", "2.0"]
    assert evaluate_all.main([*words, "eval.draws=2"]) == 0
    assert len(measured) == 4
    assert evaluate_all.main(words) == 0
    assert len(measured) == 4


def test_after_one_that_failed_the_others_go_on(measured, tmp_path, capsys):
    words = ["a.ckpt", "--data", "one.txt,no.txt,two.txt", "--out", str(tmp_path / "table")]
    assert evaluate_all.main(words) == 1
    said = capsys.readouterr()
    assert said.err.splitlines() == ["failed, not in the table: a.ckpt on no.txt"]
    assert all(name in said.out for name in ("one.txt", "two.txt"))
    assert measured == ["one.txt", "no.txt", "two.txt"]


def test_a_checkpoint_that_is_not_there_is_told_before_anything_runs(measured, tmp_path, capsys):
    words = ["a.ckpt", "absent.ckpt", "--data", "one.txt", "--out", str(tmp_path / "table")]
    assert evaluate_all.main(words) == 2
    assert "absent.ckpt does not\\x1b exist" in capsys.readouterr().err
    assert measured == []


def test_no_file_is_written_before_all_are_built(tmp_path, monkeypatch):
    def broken(rows):
        raise ValueError("a cell that no file can hold")

    monkeypatch.setattr(evaluate_all, "csv_text", broken)
    with pytest.raises(ValueError, match="no file can hold"):
        evaluate_all.write(str(tmp_path / "table"), [dict.fromkeys(evaluate_all.COLUMNS)])
    assert [*tmp_path.iterdir()] == []
