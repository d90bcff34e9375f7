"""One table from several checkpoints and corpora."""

import csv
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import ALGORITHMS, tiny, write_text

import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_all.py"


@pytest.fixture(scope="module")
def evaluate_all():
    found = importlib.util.spec_from_file_location("evaluate_all", SCRIPT)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("_launch_folder")
def test_the_table_has_every_corpus_model_and_likelihood(
    evaluate_all, tmp_path, capsys, monkeypatch
):
    def in_this_process(command, check):
        return SimpleNamespace(returncode=main.main(command[2:]))

    monkeypatch.setattr(evaluate_all.subprocess, "run", in_this_process)
    base = tiny(tmp_path)
    files = []
    for algo in ("bamdlm", "ar"):
        words = [w for w in (*base, *ALGORITHMS[algo]) if "clip_search" not in w]
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
