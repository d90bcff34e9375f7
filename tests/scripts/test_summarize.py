"""scripts/summarize.py: finished evaluations in one table."""

import csv
import json

import pytest

from scripts import summarize

PPL = {"mode": "ppl_eval", "algo": "bamdlm", "block_size": 4, "data": "ptb", "ppl": 96.812}
SAMPLES = {"algo": "sedd", "block_size": 1024, "gen_ppl": 52.0, "gen_nfes": 1000.0, "rows": 8}


@pytest.fixture
def folder(tmp_path):
    for name, content in (("a/ppl_ptb", PPL), ("b/samples", SAMPLES), ("b/settings", {"seed": 1})):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


def test_every_finished_evaluation_is_a_row(folder, capsys):
    assert summarize.main([str(folder), "--csv", str(folder / "table.csv")]) == 0
    said = capsys.readouterr()
    assert "broken.json" in said.err
    lines = said.out.splitlines()
    assert len(lines) == 2 + 2
    assert len({len(line) for line in lines}) == 1
    assert "96.81" in lines[2]
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["algo"] for row in rows] == ["bamdlm", "sedd"]
    assert rows[0]["PPL"] == "96.81"
    assert rows[1]["NFEs"] == "1000.00"


def test_every_run_of_a_report_is_a_row(tmp_path, capsys):
    runs = {"a": SAMPLES, "b": {**SAMPLES, "algo": "mdlm", "gen_ppl": 41.0}}
    del runs["b"]["block_size"]
    (tmp_path / "texts.json").write_text(json.dumps({**SAMPLES, "runs": runs}))
    assert summarize.main([str(tmp_path)]) == 0
    _, _, mdlm, sedd = capsys.readouterr().out.splitlines()
    assert ("41.00" in mdlm, "1024" in mdlm) == (True, False)
    assert ("52.00" in sedd, "1024" in sedd) == (True, True)


def test_nothing_found_is_said(tmp_path, capsys):
    assert summarize.main([str(tmp_path)]) == 1
    assert "no finished evaluation" in capsys.readouterr().err
    assert summarize.main([str(tmp_path / "nowhere")]) == 2


def test_every_likelihood_of_an_evaluation_is_a_row(tmp_path, capsys):
    found = [{"likelihood": "counts", "ppl": 50.25}, {"likelihood": "exact", "ppl": 49.75}]
    (tmp_path / "ppl_ptb.json").write_text(json.dumps(PPL | found[0] | {"likelihoods": found}))
    assert summarize.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [("counts" in line, "50.25" in line) for line in lines] == [(True, True), (False, False)]
    assert "exact" in lines[1]
    assert "49.75" in lines[1]


def test_foreign_text_does_nothing_to_the_terminal(tmp_path, capsys):
    (tmp_path / "a\x1b.json").write_text("{")
    (tmp_path / "ppl.json").write_text(json.dumps(PPL | {"data": "b\x1b|c"}))
    table = tmp_path / "table.csv"
    assert summarize.main([str(tmp_path), "--csv", str(table)]) == 0
    said = capsys.readouterr()
    assert "a\\x1b.json" in said.err
    assert "b\\\\x1b\\|c" in said.out  # Markdown has its own backslash
    assert "\x1b" not in said.out + said.err + table.read_text()
    assert summarize.main([str(tmp_path / "c\x1b")]) == 2
    assert "c\\x1b" in capsys.readouterr().err
    assert summarize.main([str(tmp_path), "--csv", "/dev/full/x"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("/dev/full")
