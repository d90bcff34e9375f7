"""A sampling run: one CSV row a text, as soon as it is done, once; completed by the same
command.
"""

import base64
import csv
import io
import json
import math
import multiprocessing
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, load_json
from networks import small
from rich.console import Console
from sampling_tools import denoiser

from data.tokenizer import get_tokenizer
from evaluation.judge import load_judge
from evaluation.quality import diversity
from samplers.params import SamplingParams
from samplers.request import Frame
from sampling import run as generation
from sampling.prompts import encode_prompts, read_prompts
from sampling.run import Model, Output, SamplingRun, Texts, run_id
from sampling.sample_file import COLUMNS, SampleFile, SampleRow
from sampling.sweep import Sweep
from sampling.view import FRESH, MASKED, SETTLED, Progress, Show, Trajectory, pieces

TOKENIZER = get_tokenizer(str(GOLDEN / "tokenizer"))
BOS, EOS, MASK = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.mask_id


def model(algo="bamdlm"):
    net = small(TOKENIZER.vocab_size, seed=2, adaln=algo != "ar")
    return denoiser(net, algo, MASK, 4)


def params(**changes):
    base = {"length": 16, "block_size": 4, "context_size": 16, "window": 16, "batch_size": 2}
    return SamplingParams(**{"bos_id": BOS, "eos_id": EOS, **base, **changes})


def job(
    folder,
    *,
    run="a",
    num_samples=5,
    algo="bamdlm",
    changes=None,
    denoise=None,
    prompts=(),
    infill=False,
    judge=None,
    rank=0,
    ranks=1,
    **output,
):
    return SamplingRun(
        Model(algo, denoise or model(algo), TOKENIZER, params(**(changes or {}))),
        Texts(num_samples, prompts, infill),
        Output(SampleFile(Path(folder) / "samples"), run, **output),
        judge,
        rank,
        ranks,
    )


def read(job):
    with open(job.output.file.path, newline="") as file:
        return list(csv.DictReader(file))


def finished(job):
    job.run()
    return job


def by_row(job):
    return sorted((int(r["row"]), r["samples"]) for r in read(job) if r["run"] == job.output.run)


# the file


def test_one_row_a_text_with_a_header_and_the_authors_columns(tmp_path):
    one = job(tmp_path)
    report = one.run()
    rows = read(one)
    assert tuple(rows[0])[: len(COLUMNS)] == COLUMNS
    assert [int(r["row"]) for r in rows] == list(range(5))
    assert {r["run"] for r in rows} == {"a"}
    assert {r["seed"] for r in rows} == {"1"}
    assert {r["gen_nfes"] for r in rows} == {"15"}
    assert {r["gen_ppl"] for r in rows} == {""}  # no judge
    assert all(r["samples"].startswith("<|endoftext|>") for r in rows)
    written = json.loads((tmp_path / "samples.json").read_text())
    assert written == {**report, "runs": {"a": report}}
    assert report["rows"] == 5
    assert report["gen_nfes"] == 15
    assert report["tokens_per_evaluation"] == 1
    assert report["acceptance"] == 1
    assert report["gen_ppl"] is None
    assert report["stopped"] == {"length": 5}


def test_the_first_six_columns_are_written_as_the_authors_do(tmp_path):
    """The recorded file has no header, and a list's repr where the text belongs."""
    golden = load_json("metrics/csv.json")
    data = golden["save_dict"]
    file = SampleFile(tmp_path / "x.csv")
    rows = [
        SampleRow(ppl, nfe, entropy, int(length), text, seed, row, "r")
        for row, (ppl, nfe, entropy, length, (text,), seed) in enumerate(
            zip(*(data[name] for name in COLUMNS[:6]), strict=True)
        )
    ]
    file.add(rows, {})
    theirs = list(csv.reader(golden["after_first_call"].splitlines(keepends=True)))
    with open(file.path, newline="") as text:
        header, *ours = csv.reader(text)
    assert tuple(header) == COLUMNS
    for mine, recorded, row in zip(ours, theirs, rows, strict=True):
        assert [float(x) for x in mine[:4]] == [float(x) for x in recorded[:4]]
        assert (repr([mine[4]]), mine[5]) == (recorded[4], recorded[5])
        assert mine[4] == row.samples
    assert file.rows("r") == {row.row: row for row in rows}
    assert file.path.read_bytes().count(b"\r\n") == 3
    assert file.summary == tmp_path / "x.json"


class Stop(Exception):
    pass


def interrupted(one, monkeypatch, groups):
    """Kill the run after so many groups of texts."""
    real = generation.generate

    def broken(*args, **kwargs):
        for number, samples in enumerate(real(*args, **kwargs)):
            if number == groups:
                raise Stop
            yield samples

    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate", broken)
        with pytest.raises(Stop):
            one.run()


def test_an_interrupted_run_is_completed_by_the_same_command(tmp_path, monkeypatch):
    whole = job(tmp_path / "whole")
    whole.run()
    one = job(tmp_path / "one")
    interrupted(one, monkeypatch, groups=4)  # four blocks: the first two texts
    assert [int(r["row"]) for r in read(one)] == [0, 1]
    assert one.missing() == [2, 3, 4]
    assert one.run() is not None
    assert by_row(one) == by_row(whole)
    before = one.output.file.path.read_bytes()
    assert one.run()["rows"] == 5
    assert one.output.file.path.read_bytes() == before


def test_what_a_killed_process_left_unfinished_is_cut_off(tmp_path):
    whole = job(tmp_path / "whole")
    whole.run()
    content = whole.output.file.path.read_bytes()
    one = job(tmp_path / "one")
    for cut in (len(content) - 1, len(content) - 9, content.rindex(b"\r\n", 0, -2) + 7, 5, 0):
        one.output.file.path.parent.mkdir(exist_ok=True)
        one.output.file.path.write_bytes(content[:cut])
        one.run()
        assert by_row(one) == by_row(whole)
        assert len(read(one)) == 5


def test_a_torn_line_of_the_log_is_passed_over(tmp_path):
    one = job(tmp_path, num_samples=3)
    one.run()
    with one.output.file.log.open("a") as log:
        log.write('{"run": "r", "stopped": {"length": 1}')  # killed here
    more = job(tmp_path, num_samples=5)
    assert more.run()["rows"] == 5
    assert sum(note["rows"] for note in more.output.file.notes(more.output.run)) == 5


def test_another_run_is_added_and_each_reports_its_own(tmp_path):
    job(tmp_path, run="a").run()
    other = job(tmp_path, run="b", num_samples=3, changes={"seed": 7})
    report = other.run()
    assert len(read(other)) == 8
    assert (report["rows"], report["seed"], report["run"]) == (3, 7, "b")


def test_more_texts_of_the_same_run_keep_the_ones_that_are_there(tmp_path):
    job(tmp_path, num_samples=2).run()
    more = job(tmp_path, num_samples=5)
    assert more.missing() == [2, 3, 4]
    more.run()
    assert len(read(more)) == 5


def test_the_text_depends_neither_on_the_batch_nor_on_the_number_of_processes(tmp_path):
    alone = job(tmp_path / "1", num_samples=8, changes={"batch_size": 1})
    alone.run()
    for batch in (3, 8):
        one = job(tmp_path / str(batch), num_samples=8, changes={"batch_size": batch})
        one.run()
        assert by_row(one) == by_row(alone)
    ranks = [job(tmp_path / "ranks", num_samples=8, rank=r, ranks=2) for r in (0, 1)]
    assert ranks[0].run() is None  # the last one reports
    assert ranks[1].run()["rows"] == 8
    assert by_row(ranks[0]) == by_row(alone)


def _as_rank(folder, rank):
    torch.set_num_threads(1)
    job(folder, num_samples=8, rank=rank, ranks=2).run()


def test_two_processes_write_one_file_with_every_row_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_as_rank, args=(tmp_path / "two", r)) for r in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    alone = job(tmp_path / "alone", num_samples=8)
    alone.run()
    both = job(tmp_path / "two", num_samples=8)
    assert by_row(both) == by_row(alone)
    assert json.loads((tmp_path / "two" / "samples.json").read_text())["rows"] == 8


def test_a_process_waits_for_no_text_of_another(tmp_path, monkeypatch):
    """The second runs from start to end while the first makes its second text."""
    first, second = (job(tmp_path, num_samples=8, rank=r, ranks=2) for r in (0, 1))
    real, inside = generation.generate, []

    def slow(*args, **kwargs):
        for number, samples in enumerate(real(*args, **kwargs)):
            if number == 1 and not inside:
                inside.append(second)
                assert second.run() is None
                assert second.missing() == []
            yield samples

    monkeypatch.setattr(generation, "generate", slow)
    assert first.run()["rows"] == 8
    assert inside


def test_every_row_says_how_its_text_was_made(tmp_path):
    about = {"checkpoint": "x.ckpt"}
    prompts = [(BOS, 5), (BOS, 6), (BOS, 7)]
    changes = {"steps": "threshold", "threshold": 0.5}
    one = finished(job(tmp_path, changes=changes, num_samples=4, prompts=prompts, about=about))
    other = finished(job(tmp_path, run="b", num_samples=1, changes={"nucleus_p": 0.9}))
    first, *_ = rows = read(other)
    assert [row["prompt"] for row in sorted(rows[:4], key=lambda r: int(r["row"]))] == [*"0120"]
    assert [row["threshold"] for row in rows] == [*["0.5"] * 4, ""]
    assert [row["steps"] for row in rows] == [*["threshold"] * 4, "first_hitting"]
    assert [row["nucleus_p"] for row in rows] == [*["1.0"] * 4, "0.9"]
    assert [row["checkpoint"] for row in rows] == [*["x.ckpt"] * 4, ""]
    assert (first["algo"], first["block_size"], first["window"]) == ("bamdlm", "4", "")
    assert (first["k"], first["T"], rows[-1]["prompt"]) == ("", "", "")
    assert one.output.file.reports().keys() == {"a", "b"}
    assert one.output.file.reports()["a"]["threshold"] == 0.5


def test_the_processes_of_a_sweep_share_the_rows_of_each_point(tmp_path, capsys):
    """The last one to be done with a point prints its line, the last of all prints the table."""
    points = {"k=1": {"k": 1}, "k=2": {"k": 2}}

    def sweep(folder, **more):
        return Sweep(
            {
                text: job(folder, run=text, changes={"steps": "confidence", **change}, **more)
                for text, change in points.items()
            }
        )

    sweep(tmp_path / "ranks", rank=0, ranks=2).run()
    first = capsys.readouterr().out.splitlines()
    assert [line for line in first if line.startswith("k=")] == []
    sweep(tmp_path / "ranks", rank=1, ranks=2).run()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if line.startswith("k=")] == [*points, *points]
    assert said[-1].startswith("texts: ")
    sweep(tmp_path / "one").run()
    for text in points:
        assert by_row(job(tmp_path / "ranks", run=text)) == by_row(job(tmp_path / "one", run=text))
    reports = job(tmp_path / "ranks").output.file.reports()
    assert [reports[text]["gen_nfes"] for text in points] == [15, 8]


def test_a_run_is_named_by_all_that_decides_its_texts():
    first = run_id("ckpt", params(), 1)
    assert first == run_id("ckpt", params(), 1)
    assert len({first, run_id("other", params(), 1), run_id("ckpt", params(), 2)}) == 3


def test_the_memory_of_the_cache_is_said_before_the_run(tmp_path, capsys):
    one = job(tmp_path, changes={"kv_cache": True, "batch_size": 3})
    assert one.cache_bytes() == one.model.denoise.new_cache(3, 16).bytes
    Sweep({"one": one, "other": job(tmp_path, run="other", changes={"kv_cache": True})}).run()
    said = capsys.readouterr().out
    assert said.count("the cache takes") == 1
    assert "the cache takes 0.0 MiB for 3 texts of 16 visible tokens" in said
    one.run()
    assert "the cache takes" not in capsys.readouterr().out  # all is there
    assert by_row(one) == by_row(finished(job(tmp_path / "plain")))


# figures


@pytest.fixture(scope="module")
def judge():
    return load_judge(str(GOLDEN / "judge"), batch_size=2)


def test_every_row_has_the_figures_of_its_own_text(tmp_path, judge, capsys):
    about = {"judge": "golden", "checkpoint": "x.ckpt", "precision": "32"}
    one = job(tmp_path, judge=judge, num_samples=3, about=about)
    report = one.run()
    said = capsys.readouterr().out
    assert "steps first_hitting, nucleus 1.0, precision 32, draws float32, seed 1" in said
    figures = f"{report['gen_ppl']:,.2f} ± {report['gen_ppl_error']:,.2f}"
    assert f"generative perplexity {figures} (judge: golden)" in said
    own = diversity(TOKENIZER.encode_batch([row["samples"] for row in read(one)]), TOKENIZER.eos_id)
    assert {name: report[name] for name in own} == {name: x.value for name, x in own.items()}
    assert f"repeated 4-grams {own['repetition'].value:.1%}" in said
    rows = read(one)
    scores = judge.score([r["samples"] for r in rows])
    for row, score in zip(rows, scores, strict=True):
        assert float(row["gen_ppl"]) == pytest.approx(score.perplexity)
        assert float(row["gen_entropy"]) == pytest.approx(score.entropy)
        assert int(row["gen_lengths"]) == score.tokens
    total = sum(s.nll for s in scores) / sum(s.tokens for s in scores)
    assert report["gen_ppl"] == pytest.approx(math.exp(total))
    assert report["gen_ppl_mean"] == pytest.approx(sum(s.perplexity for s in scores) / 3)
    assert report["judge"] == "golden"


@pytest.mark.parametrize("name", list(load_json("sampling/generate_samples.json")))
def test_recorded_texts_have_the_recorded_figures(judge, name):
    """main.generate_samples of the authors: texts, and what it wrote for each. It cuts re-tokenized
    texts at model.length (reference-quirks.md): so does this test."""
    entry = load_json("sampling/generate_samples.json")[name]
    scores = judge.score_tokens([t[: entry["length"]] for t in judge.tokenize(entry["texts"])])
    assert [s.perplexity for s in scores] == pytest.approx(entry["gen_ppls"], rel=1e-5)
    assert [s.entropy for s in scores] == pytest.approx(entry["gen_entropies"], rel=1e-6)
    assert [s.tokens for s in scores] == entry["gen_lengths"]


def test_rejection_is_reported(tmp_path):
    """Blocks of one text: 256 tokens of a model that always says the same."""
    stuck = model("mdlm")
    with torch.no_grad():
        stuck.backbone.output_layer.linear.bias[7] = 100.0
    changes = {
        "length": 256,
        "window": 256,
        "steps": "ancestral",
        "num_steps": 1,
        "reject_low_entropy": True,
    }
    report = job(tmp_path, algo="mdlm", num_samples=2, changes=changes, denoise=stuck).run()
    assert report["acceptance"] == 0
    assert report["reject_low_entropy"] is True


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"steps": "threshold", "threshold": 0.25}, "steps threshold, threshold 0.25, nucleus"),
        (
            {"steps": "confidence", "k": 2},
            "steps confidence, k 2, confidence probability, order_temperature 0.0, nucleus",
        ),
        ({"corrector": 1}, "steps first_hitting, corrector 1, nucleus"),
        ({"steps": "remask", "num_steps": 3}, "steps remask, T 3, remask_eta 0.02, nucleus"),
        ({}, "steps first_hitting, nucleus"),
        ({"temperature": 0.5, "top_k": 3}, "first_hitting, temperature 0.5, top_k 3, nucleus"),
    ],
)
def test_the_report_has_the_numbers_of_the_step_rule(tmp_path, capsys, rule, told):
    report = job(tmp_path, num_samples=1, changes=rule).run()
    said = capsys.readouterr().out
    assert told in said
    assert "no judge, so no generative perplexity\n" in said
    numbers = {"k", "confidence", "threshold", "remask_eta"} & report.keys()
    assert {name: report[name] for name in numbers} == {
        name: getattr(params(**rule), name) for name in numbers
    }
    assert ("threshold" in numbers) == (rule.get("steps") == "threshold")


def test_a_complete_run_says_that_nothing_is_recorded(tmp_path, capsys):
    page = tmp_path / "page.html"
    one = job(tmp_path, num_samples=1, trajectory=str(page))
    one.run()
    assert f"text 0 replays in {page}" in capsys.readouterr().out
    page.unlink()
    one.run()
    assert "nothing is shown or recorded: choose" in capsys.readouterr().out
    assert not page.exists()


def test_variable_lengths_are_reported(tmp_path):
    changes = {"var_length": True, "eos_id": 5, "length": 256, "batch_size": 12}
    report = job(tmp_path, changes=changes, num_samples=12).run()
    assert sum(report["stopped"].values()) == 12
    assert report["stopped"]["eos"] > 0


# prompts


def test_prompts_begin_the_texts_and_share_the_rows(tmp_path):
    prompts = encode_prompts(
        ["the work", "of any license"], TOKENIZER, infill=False, length=16, context_size=16
    )
    one = job(tmp_path, prompts=prompts, num_samples=4)
    one.run()
    texts = [text for _, text in by_row(one)]
    assert all(t.startswith("<|endoftext|>the work") for t in texts[::2])
    assert all(t.startswith("<|endoftext|>of any license") for t in texts[1::2])
    assert len(set(texts)) == 4


def test_gaps_are_filled_and_the_rest_is_kept(tmp_path):
    (ids,) = encode_prompts(
        ["the work [MASK] [MASK][MASK] any"], TOKENIZER, infill=True, length=16, context_size=16
    )
    assert ids.count(MASK) == 3
    assert list(ids) == [
        BOS,
        *TOKENIZER.encode("the work"),
        *[MASK] * 3,
        *TOKENIZER.encode(" any"),
    ]
    one = job(tmp_path, algo="mdlm", prompts=[ids], infill=True, num_samples=3)
    report = one.run()
    assert report["tokens_per_evaluation"] == 1
    for _, text in by_row(one):
        assert text.startswith("<|endoftext|>the work")
        assert text.endswith(" any")
        assert "[MASK]" not in text


def test_prompt_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert read_prompts(tmp_path / "a.txt") == ["one", " two "]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one", "id": 3}\n\n{"prompt": "two\\nlines"}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["one", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\n \n", "is empty"),
        ("a.txt", b"\xff\xfe\xfa", "is not UTF-8 text"),
        ("a.csv", b"x", "must be a .txt or .jsonl file"),
        ("b.txt", None, "does not exist"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n', "line 1 must be an object with a text under `prompt`"),
        ("a.jsonl", b'["a"]\n', "line 1 must be an object"),
        ("a.jsonl", b'{"prompt": 3}\n', "line 1 must be an object"),
    ],
)
def test_prompt_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("prompt", "infill", "change", "message"),
    [
        ("a [MASK] b", False, {}, "prompt 1 .* set sampling.infill=true"),
        ("a b", True, {}, r"prompt 1 .* has no \[MASK\]"),
        ("the work of " * 20, False, {}, "model.length=16 has room for 15"),
        ("the work of " * 20 + "[MASK]", True, {}, "model.length=16 has room for 16"),
        ("the work of any", False, {"context_size": 4}, "more than the 4 that are visible"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(prompt, infill, change, message):
    limits = {"length": 16, "context_size": 16} | change
    with pytest.raises(ValueError, match=message):
        encode_prompts([prompt], TOKENIZER, infill=infill, **limits)


# refused before anything is written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "leaves 0 texts"),
        ({"rank": 2, "ranks": 2}, "rank 2 is not one of 2"),
        ({"infill": True, "changes": {"var_length": True}}, "has no place beside sampling.infill"),
        ({"changes": {"nucleus_p": 0}}, "sampling.nucleus_p=0"),
        ({"changes": {"length": 18}}, "block_size=4 does not divide"),
    ],
)
def test_a_run_that_cannot_be_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        job(tmp_path, **change)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "samples").write_text("name,age\nx,3\n")
    with pytest.raises(ValueError, match="is not a file of samples: it begins with 'name,age'"):
        job(tmp_path).output.file.check()
    assert (tmp_path / "samples").read_text() == "name,age\nx,3\n"
    (tmp_path / "samples").unlink()
    (tmp_path / "samples").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        job(tmp_path).output.file.check()


# looking on


def test_runs_of_tokens_are_masked_fresh_or_settled():
    assert pieces([5, 6, MASK, 7], [5, MASK, MASK, MASK], MASK) == [
        (SETTLED, [5]),
        (FRESH, [6]),
        (MASKED, [MASK]),
        (FRESH, [7]),
    ]


def test_the_terminal_shows_the_text_being_written(tmp_path):
    console = Console(record=True, width=80, force_terminal=True, file=io.StringIO())
    before = torch.tensor([[BOS, *TOKENIZER.encode("the work"), MASK, MASK]])
    after = before.clone()
    after[0, -2] = TOKENIZER.encode(" of")[0]
    with Show(TOKENIZER, console=console) as show:
        show(Frame([3], before, before, 1, before.log()))
        show(Frame([3], before, after, 2, after.log()))
    text = console.export_text()
    assert "text 3, evaluation 2" in text
    assert "<|endoftext|>the work" in text
    assert "░" in text


def test_show_runs_with_a_run(tmp_path, capsys):
    job(tmp_path, show=True, num_samples=2).run()
    assert "evaluation 15" in capsys.readouterr().out


def test_progress_speaks_in_a_log_file(capsys, monkeypatch):
    monkeypatch.setattr("sampling.view.LINE_SECONDS", -1)
    with Progress(2, enabled=True) as progress:
        progress.tick(10, 3)
        progress.tick(texts=1)
    assert "1 of 2 texts, 10 tokens" in capsys.readouterr().out


def page_of(tmp_path):
    one = job(
        tmp_path,
        algo="bamdlm",
        num_samples=2,
        prompts=[(BOS, *TOKENIZER.encode("the </script> work"))],
        changes={"length": 32, "context_size": 32},
        trajectory=str(tmp_path / "page.html"),
    )
    one.run()
    return tmp_path / "page.html", by_row(one)[0][1]


def test_the_trajectory_holds_every_step_of_one_text(tmp_path):
    page, _ = page_of(tmp_path)
    text = page.read_text()
    data = text.split('id="data">')[1].split("</script>")[0]
    data = json.loads(data)
    given = {i for i, _ in data["given"]}
    written = [i for step in data["steps"] for i, _ in step]
    assert sorted([*given, *written]) == list(range(32))
    assert all(len(step) == 1 for step in data["steps"])
    assert "http" not in text  # self-contained


CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_the_page_replays_in_a_browser(tmp_path):
    page, text = page_of(tmp_path)
    probe = """<script>
      const step = () => document.getElementById('step').textContent;
      const shown = () => document.getElementById('text').textContent;
      const out = [step(), shown()];
      bar.value = 3; bar.dispatchEvent(new Event('input')); out.push(step());
      bar.value = 0; bar.dispatchEvent(new Event('input')); out.push(step(), shown());
      document.body.innerHTML = '';
      document.body.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(out))));
    </script>"""
    page.write_text(page.read_text().replace("</html>", probe + "</html>"))
    found = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    body = found.split("<body>")[1].split("</body>")[0].strip()
    end, whole, third, start, masked = json.loads(base64.b64decode(body))
    steps = end.split(" of ")[1].split(",")[0]
    assert end == f"evaluation {steps} of {steps}, 0 tokens masked"
    # a character spread over two tokens shows as two unknown ones
    assert whole.encode("ascii", "ignore") == text.encode("ascii", "ignore")
    assert third.startswith(f"evaluation 3 of {steps}, ")
    assert start == f"evaluation 0 of {steps}, {steps} tokens masked"
    assert masked.startswith("<|endoftext|>the </script> work")
    assert masked.count("░") == int(steps)


def test_a_trajectory_can_be_recorded_by_hand(tmp_path):
    record = Trajectory(tmp_path / "deep" / "t.html", TOKENIZER, row=0, about={"algo": "<b>"})
    before = torch.tensor([BOS, MASK])
    record.record(before, torch.tensor([BOS, 4]))
    record.write()
    assert "&lt;b&gt;" in (tmp_path / "deep" / "t.html").read_text()
