"""scripts/compare.py: runs beside each other, as text, CSV, Markdown, a picture and one page."""

import base64
import csv
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scripts import compare, plot_run

HOSTILE = "<img src=x onerror=alert(1)>|`[a](b) \x1b[31m \u202e"
SETTINGS = {"seed": 1, "block_size": 4, "loader.global_batch_size": 8, "model.length": 16}
LOG = (
    "step,unix_time,trainer/loss,throughput/tokens_per_second,val/ppl,val/nll_error\n"
    "10,1.0,3.5,100.0,,\n20,2.0,3.0,300.0,20.0,0.1\n30,3.0,2.5,200.0,10.0,0.25\n"
)
COUNTS = {"likelihood": "counts", "ppl": 50.25, "ppl_error": 0.5, "tokens": 1000}
EXACT = {"likelihood": "exact", "ppl": 49.75, "ppl_error": None, "tokens": 1000}
PPL = {"mode": "ppl_eval", "data": "corpora/ptb.txt", "ema": True}
SAMPLED = {"gen_ppl": 30.5, "gen_entropy": 3.25, "gen_lengths": 16.0, "gen_nfes": 8.0}


def make_run(folder, log=LOG, **settings):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/last.ckpt").touch()
    (folder / "settings.json").write_text(json.dumps(SETTINGS | settings))
    (folder / "metrics.csv").write_text(log)
    return folder


def report(path, content, run):
    path.write_text(json.dumps(content | {"checkpoint": f"{run}/checkpoints/last.ckpt"}))


def texts(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["gen_ppl", "samples", "run"], *rows])


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs, of seeds 1 and 2, with what was measured of them."""
    monkeypatch.chdir(tmp_path)
    one, two = (make_run(Path("outputs", name), seed=n) for name, n in (("one", 1), ("two", 2)))
    report(one / "ppl_ptb-a.json", PPL | COUNTS | {"likelihoods": [COUNTS, EXACT]}, one)
    at_8 = COUNTS | {"block_size": 8, "ppl": 55.5}
    report(one / "ppl_ptb-c.json", PPL | at_8, one)
    # the evaluation of a run with the same settings lies in the folder of the first
    report(one / "ppl_ptb-b.json", PPL | COUNTS | {"ppl": 60.0, "ppl_error": 0.75}, two)
    first = SAMPLED | {"run": "a", "checkpoint": f"{one}/checkpoints/last.ckpt"}
    last = first | {"run": "b", "gen_ppl": 31.5, "steps": "threshold", "threshold": 0.7}
    report(Path("outputs/texts.json"), last | {"runs": {"a": first, "b": last}}, one)
    texts(Path("outputs/texts.csv"), [[1, "of a", "a"], *([1, f"text {i}", "b"] for i in range(3))])
    report(Path("samples_len16.json"), SAMPLED | {"run": "c"}, two)  # of before there were several
    texts(Path("samples_len16"), [[1, HOSTILE, "c"]])
    return one, two


def test_the_table_has_what_differs_and_what_was_measured(runs, capsys):
    assert compare.main([*map(str, runs), "--out", "out"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    with Path("out/compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    error = 10.0 * 0.25  # of the perplexity, from that of its nats
    ptb = "ptb (1,000 tokens)"
    at_8 = f"PPL counts at S=8, {ptb}"
    assert rows[0] == {
        **{"run": "one", "seed": "1", "steps": "30", "tokens seen": str(30 * 8 * 16)},
        **{"val PPL in training": "10.0", "val PPL in training: error": str(error)},
        **{f"PPL counts, {ptb}": "50.25", f"PPL counts, {ptb}: error": "0.5"},
        f"PPL exact, {ptb}": "49.75",
        **{at_8: "55.5", f"{at_8}: error": "0.5"},
        **{
            "texts by": "threshold",
            "gen PPL": "31.5",
            "entropy": "3.25",
            "length": "16.0",
            "NFE": "8.0",
        },
        "training tokens/s and device": "200.0",
    }
    assert rows[1][f"PPL counts, {ptb}"] == "60.0"
    assert rows[1][f"PPL exact, {ptb}"] == ""
    assert rows[1]["gen PPL"] == "30.5"
    head, one, two = said.out.splitlines()[:3]
    assert "block_size" not in head
    assert "50.25 ± 0.50" in one
    assert "60.00 ± 0.75" in two
    page = Path("out/compare.md").read_text()
    assert "| 50.25 ± 0.50 " in page
    assert "![perplexity over steps and tokens](compare.png)" in page
    assert "    text 0\n\n    text 1\n" in page
    assert "text 2" not in page
    assert "of a" not in page
    head = next(line for line in page.splitlines() if "checkpoint" in line)
    assert [name.strip() for name in head.split("|")][-4:-1] == ["checkpoint", "threshold", "file"]
    assert page.count("| outputs/one/ppl_ptb-a.json ") == 2


class Page(HTMLParser):
    """The tags, their attributes and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.given, self.text = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.given += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_everything_and_foreign_text_is_no_markup(runs):
    name = Path("outputs") / HOSTILE.replace("/", "")
    make_run(name, seed=HOSTILE)
    report(name / "ppl_x.json", PPL | COUNTS | {"likelihood": HOSTILE, "data": HOSTILE}, name)
    assert compare.main([*map(str, (*runs, name)), "--out", "out"]) == 0
    page = Page(Path("out/compare.html").read_text())
    tags = "html head meta title style body h1 h2 div table tr th td img pre"
    assert " ".join(sorted(page.tags)) == " ".join(sorted(tags.split(" ")))
    wanted = {"lang", "charset", "http-equiv", "content", "alt", "src"}
    assert {attribute for attribute, _ in page.given} == wanted
    (source,) = [value for attribute, value in page.given if attribute == "src"]
    kind, _, data = source.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == Path("out/compare.png").read_bytes()
    assert data.startswith("iVBORw0KGgo")
    escaped = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert page.text.count(escaped) >= 2  # the text, and the setting
    for suffix in ("html", "md", "csv"):
        written = Path(f"out/compare.{suffix}").read_text()
        assert not {"\x1b", "\u202e"} & set(written)
        assert suffix == "csv" or "<img src=x" not in written.replace(f"    {escaped}", "")
    lines = Path("out/compare.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")][:5]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_the_curves_are_over_steps_and_over_tokens(runs, monkeypatch):
    drawn = []
    curve = compare.curve

    def look(axes, *given):
        curve(axes, *given)
        drawn.append([line.get_xydata().tolist() for line in axes.lines])

    monkeypatch.setattr(compare, "curve", look)
    found, problems = compare.read(compare.argparse.Namespace(out=None, reports=[], runs=runs))
    assert problems == []
    found[1].settings["model.length"] = None  # then nobody knows the tokens
    assert compare.draw(found, Path("picture.png"))
    steps, tokens, second = drawn
    assert steps[1] == [[20, 20.0], [30, 10.0]]
    assert [x for x, _ in steps[0]] == [10, 20, 30]
    assert [[x * 8 * 16, y] for x, y in steps[1]] == tokens[1]
    assert second[:2] == steps
    assert len(second) == 4


def test_sizes_that_a_checkpoint_overrides_are_no_difference(tmp_path, capsys):
    llama = {"algo.backbone": "llama", "training.from_pretrained": "SmolLM2", "model.n_blocks": 12}
    for name, layers in {"a": 12, "b": 8}.items():
        make_run(tmp_path / name, **llama | {"model.n_blocks": layers})
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "model.n_blocks" not in capsys.readouterr().out
    scratch = llama | {"training.from_pretrained": None, "model.n_blocks": 30}
    make_run(tmp_path / "c", **scratch)
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    said = capsys.readouterr().out
    assert "model.n_blocks" in said
    assert "30" in said
    assert "12" not in said


def test_one_run_is_enough_and_figures_that_are_missing_are_left_out(tmp_path, capsys):
    folder = tmp_path / "only"
    folder.mkdir()
    (folder / "ppl_ptb.json").write_text(json.dumps(PPL | COUNTS | {"checkpoint": "org/model"}))
    out = tmp_path / "out"
    assert compare.main([str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out.split()[:4] == ["run", "PPL", "counts,", "ptb"]
    assert sorted(p.name for p in out.iterdir()) == ["compare.csv", "compare.html", "compare.md"]


def test_what_cannot_be_compared_is_told_at_once(tmp_path, capsys):
    for name in ("empty", "a\x1b[31m"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    wrong = [str(tmp_path / name) for name in ("nowhere", "file", "empty", "a\x1b[31m")]
    more = ["--out", str(tmp_path / "file"), "--reports", str(tmp_path / "no.json")]
    assert compare.main([*wrong, *more]) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == ""
    assert len(lines) == 6
    assert f"--out={tmp_path}/file is a file: name a folder" in lines
    assert f"{tmp_path}/nowhere does not exist: give the folder of a run, outputs/…/…" in lines
    assert f"{tmp_path}/file is no folder: give the folder of a run, outputs/…/…" in lines
    assert sum("holds no settings.json, metrics.csv or ppl_*.json: give" in x for x in lines) == 2
    assert "\x1b" not in said.err


BROKEN = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "bytes": bytes(range(256)),
    "NUL": b"step,trainer/loss\n1,\0\n",
    "Latin-1": '{"seed": "é"}'.encode("latin-1"),
    "numbers": b'{"ppl": 1e999, "gen_nfes": "x", "tokens": [], "likelihoods": [1, {"ppl": {}}]}',
    "runs": b'{"gen_nfes": 1, "runs": {"a": 1, "b": {"gen_nfes": NaN, "checkpoint": 3}}}',
    "Lightning's": b"epoch,step,train_loss\n0,x,1.0\n",
    "huge": b"step,trainer/loss,val/ppl\n" + b"9" * 300 + b",1.0,2.0\n",
    "a long cell": b"step,trainer/loss\n1," + b"x" * 200_000 + b"\n",
    "a name of ours": b'{"run": [1], "steps": 2}',
    "many digits": b"step,trainer/loss\n" + b"9" * 5000 + b",1.0\n",
    "not finite": b"step,trainer/loss,val/ppl,val/nll_error\n1,nan,inf,nan\n2,-inf,nan,\n",
}
DRAWN = ("not finite",)  # drawing takes longest
FILES = ("settings.json", "metrics.csv", "ppl_x.json", "texts.json", "texts.csv")


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_cannot_be_read_are_named_and_left_out(runs, kind, capsys):
    one, _ = runs
    report(one / "texts.json", SAMPLED | {"run": "a"}, one)
    texts(one / "texts.csv", [[1, "of a", "a"]])
    for name in FILES:
        kept = (one / name).read_bytes() if (one / name).exists() else None
        (one / name).write_bytes(BROKEN[kind])
        assert compare.main([*map(str, runs)]) == 0, name
        for line in capsys.readouterr().err.splitlines():
            assert line.startswith("left out: ")
            assert name in line
        (one / name).unlink()
        if kept is not None:
            (one / name).write_bytes(kept)
    for name in FILES:
        (one / name).write_bytes(BROKEN[kind])
    assert compare.main([*map(str, runs), *(["--out", "out"] if kind in DRAWN else [])]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert all(line.startswith(("left out: ", "no texts beside ")) for line in errors)
    assert "Traceback" not in "".join(errors)


def test_a_fifo_in_a_run_folder_is_not_waited_for(runs, capsys):
    for name in ("ppl_y.json", "texts.csv"):
        os.mkfifo(runs[0] / name)
    (runs[0] / "metrics.csv").unlink()
    os.mkfifo(runs[0] / "metrics.csv")
    assert compare.main([str(runs[0])]) == 0
    assert "metrics.csv is no regular file" in capsys.readouterr().err


def test_a_full_disk_is_told(runs, monkeypatch, capsys):
    monkeypatch.setattr(compare, "write", lambda *args: Path("/dev/full").write_text("x"))
    assert compare.main([str(runs[0]), "--out", "out"]) == 1
    assert "No space left" in capsys.readouterr().err


def test_without_the_template_of_its_page_no_table_is_written(runs, monkeypatch):
    monkeypatch.setattr(compare, "PAGE", Path("absent.html"))
    assert (compare.main([str(runs[0]), "--out", "out"]), [*Path("out").glob("*.csv")]) == (1, [])


def test_a_reader_that_goes_away_is_no_error(runs):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, compare.__file__, *map(str, runs)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_picture_of_one_run_is_drawn_as_before(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plot_run.py", str(runs[0])])
    assert plot_run.main() == 0
    assert capsys.readouterr().out.strip() == f"{runs[0]}/curve.png"
    (runs[0] / "metrics.csv").unlink()
    monkeypatch.setattr("sys.argv", ["plot_run.py", "a\x1bb"])
    assert plot_run.main() == 2
    assert "a\\x1bb/metrics.csv does not exist" in capsys.readouterr().err
    (runs[0] / "metrics.csv").write_bytes(BROKEN["a long cell"])
    monkeypatch.setattr("sys.argv", ["plot_run.py", str(runs[0])])
    assert plot_run.main() == 2
    assert "metrics.csv holds no trainer/loss yet" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["plot_run.py", str(runs[1]), "settings.json/curve.png"])
    Path("settings.json").touch()
    assert plot_run.main() == 1
    assert capsys.readouterr().err.startswith("settings.json")
