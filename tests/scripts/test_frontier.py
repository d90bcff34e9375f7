"""The frontier of recorded checkpoints: one command, again after a stop, and what it refuses."""

import csv
import json
import math

import pytest
from checkpoint_helpers import recorded_file
from runs import write_text

from evaluation.judge import load_judge
from evaluation.quality import perplexity
from scripts import frontier
from scripts.support import frontier_report
from scripts.support.texts import read_texts


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {name: recorded_file(name, folder) for name in ("bd3lm_bs4", "ar", "sedd", "mdlm")}


def arguments(files, out, *more, models=("bd3lm_bs4", "ar", "sedd", "mdlm")):
    return [
        *(f"{name}={files[name]}" for name in models),
        f"--judge={files['ar']}",
        f"--out={out}",
        *("--texts=4", "--temperatures=0.7,1", "--device=cpu"),
        *more,
        "--",
        f"data.cache_dir={out / 'cache'}",
    ]


def read(out):
    with (out / "frontier.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_algorithm_has_its_points(files, tmp_path):
    """NFE decides how many positions a step reveals, or how many steps there are."""
    words = ["--steps=confidence,ancestral", "--nfe=8,31", "--set=corrector=0,1"]
    argv = arguments(files, tmp_path, *words)
    args, data = frontier.parse(argv)
    judge = frontier.judge_of(args, data)
    points = [
        p for name, path in args.checkpoints for p in frontier.plan(name, path, judge, args, data)
    ]
    found = {}
    for each in points:
        found.setdefault((each.model, each.rule), set()).add(tuple(each.numbers.items()))
    corrected = [("corrector", 0)], [("corrector", 1)]
    assert found == {
        ("bd3lm_bs4", "confidence"): {(*c, ("k", k)) for c in corrected for k in (4, 1)},
        ("bd3lm_bs4", "ancestral"): {(*c, ("num_steps", t)) for c in corrected for t in (1, 4)},
        ("ar", "ar"): {()},
        ("sedd", "sedd"): {(("num_steps", t),) for t in (8, 31)},
        ("mdlm", "confidence"): {(("k", k),) for k in (4, 1)},
        ("mdlm", "ancestral"): {(("num_steps", t),) for t in (8, 31)},
    }
    assert len(points) == 2 * sum(map(len, found.values()))
    assert len({each.run.output.run for each in points}) == len(points)
    assert {each.run.model.params.temperature for each in points} == {0.7, 1}


def test_points_of_several_block_sizes_ask_the_network_in_their_blocks(files, tmp_path, capsys):
    """NFE decides for each how many positions a step reveals: 32 tokens in 8 evaluations."""
    words = ["--steps=confidence", "--nfe=8", "--set=block_size=4,8"]
    args, data = frontier.parse(arguments(files, tmp_path, *words, models=["bd3lm_bs4"]))
    judge = frontier.judge_of(args, data)
    points = frontier.plan("x", files["bd3lm_bs4"], judge, args, data)
    assert [each.numbers for each in points[::2]] == [
        {"k": 4, "block_size": 4},
        {"k": 4, "block_size": 8},
    ]
    for each in points:
        model = each.run.model
        assert model.denoise.block_size == model.params.block_size == each.numbers["block_size"]
    assert "block_size=8: the network was trained at 4\n" in capsys.readouterr().out


def test_texts_are_judged_as_by_sample_eval(files, tmp_path, monkeypatch):
    """Special tokens that the judge does not have are its EOS. Real texts are as long for the judge
    as those of the models, whose first token is BOS."""
    args, data = frontier.parse(arguments(files, tmp_path, "--length=20", models=["ar"]))
    judge = frontier.judge_of(args, data)
    assert len(judge.bos) == 1
    asked = []
    monkeypatch.setattr(frontier, "read_texts", lambda *which: asked.append(which[1]) or ["a"])
    args.reference = "real"
    frontier.reference(args, judge, data)
    assert asked == [19]
    monkeypatch.setattr(judge.tokenizer, "get_vocab", dict)
    (point, *_) = frontier.plan("ar", files["ar"], judge, args, data)
    assert point.run.judge.foreign == point.run.model.tokenizer.hf.all_special_tokens != []


def test_points_are_measured_once(files, tmp_path, capsys, monkeypatch):
    texts = tmp_path / "real.txt"
    texts.write_text("the work of the king and the day\nany of the night and the time\n")
    words = ["--steps=confidence", "--nfe=8", f"--reference={texts}"]
    command = arguments(files, tmp_path, *words, models=["mdlm", "ar"])
    assert frontier.main(command) == 0
    real, *found = read(tmp_path)
    assert [(r["model"], r["temperature"]) for r in found] == [
        *(("mdlm", "0.7"), ("mdlm", "1.0"), ("ar", "0.7"), ("ar", "1.0"))
    ]
    for each in found:
        assert float(each["gen_ppl"]) > 1
        assert 0 < float(each["gen_ppl_error"]) < float(each["gen_ppl"])
        assert 0 < float(each["entropy"]) < math.log(32)
        assert each["texts"] == "4"
        assert float(each["nfe"]) == {"mdlm": 8, "ar": 31}[each["model"]]  # BOS is given
    judge = load_judge(files["ar"])
    scored = perplexity(judge.score(texts.read_text().splitlines()))
    assert float(real["gen_ppl"]) == pytest.approx(scored.value)
    assert float(real["gen_ppl_error"]) == pytest.approx(scored.error)
    table = json.loads((tmp_path / "frontier.json").read_text())
    assert [p["run"] for p in table["points"]][1:] == [r["run"] for r in found]
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert "real text" in capsys.readouterr().out
    monkeypatch.setattr("sampling.run.generate", None)  # nothing is written again
    assert frontier.main(command) == 0
    assert read(tmp_path) == [real, *found]


def test_a_point_without_a_perplexity_is_told_and_not_drawn(tmp_path):
    """As where all that is written is EOS."""
    empty = dict.fromkeys(frontier.COLUMNS) | {"model": "m", "steps": "s", "entropy": 0.0}
    assert "–" in frontier.as_text([empty]).splitlines()[-1]
    frontier.draw([empty], tmp_path / "none.png", "judge")
    assert (tmp_path / "none.png").read_bytes()[:4] == b"\x89PNG"


def test_the_entropy_of_real_text_is_met_between_two_temperatures():
    a = {"entropy": 4.0, "entropy_error": 0.01, "gen_ppl": 100.0, "gen_ppl_error": 3.0}
    b = {"entropy": 5.0, "entropy_error": 0.02, "gen_ppl": 400.0, "gen_ppl_error": 8.0}
    middle = frontier_report.between(a, b, 4.5)
    assert middle.value == pytest.approx(200)
    slope = math.log(4)
    parts = (math.hypot(0.03, 0.01 * slope) / 2, math.hypot(0.02, 0.02 * slope) / 2)
    assert middle.error == pytest.approx(200 * math.hypot(*parts))
    assert frontier_report.between(a, b, 4.0).value == pytest.approx(100)
    named = {"model": "m", "steps": "s", "numbers": "", "temperature": 1.0}
    real = {**a, "model": frontier.REAL, "entropy": 4.5}
    (line,) = frontier.matched([real, named | a, named | b])
    assert line.startswith("m s: generative perplexity 200.00 ± ")
    assert not list(frontier.matched([real | {"entropy": 6.0}, named | a, named | b]))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set=k=9", "--steps=confidence"], "sampling.k=9 is more than the block_size=4"),
        (["--length=30"], "block_size=4 does not divide model.length=30"),
        (["--set=threshold=0.5"], "--set threshold: no point reads it"),
        (["--temperatures=-1"], "sampling.temperature=-1.0 must be in"),
        (["--reference=nothing"], "nothing is neither a file nor a corpus"),
        (["--reference=none.txt"], "none.txt does not exist"),
        (["--judge=/no/judge"], "--judge='/no/judge' cannot be loaded"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(more, said, files, tmp_path, capsys):
    assert frontier.main(arguments(files, tmp_path, *more, models=["bd3lm_bs4"])) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps=best"], "best is none of"),
        (["--texts=0"], "0 must be at least 1"),
        *(([f"--set={name}=1"], f"{name} is none of") for name in frontier.NOT_SET),
        (["--set=entropy_bound=0.1,inf"], "entropy_bound=0.1,inf must be finite"),
        *(
            ([f"--nfe={nfe}"], f"{nfe} must be numbers above 0")
            for nfe in ("inf", "8,nan", "0", "-8")
        ),
        (["--length=1"], "1 must be at least 2"),
        (["x/run/checkpoints/last.ckpt", "y/run/checkpoints/last.ckpt"], "two checkpoints are"),
    ],
)
def test_a_command_that_is_wrong_is_refused(more, said, files, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        frontier.main([*more, *arguments(files, tmp_path, models=["ar"])])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_texts_come_from_files_and_corpora(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two\\nlines"}\n')
    assert read_texts(str(tmp_path / "a.jsonl"), 8, None) == ["one", "two\nlines"]
    assert read_texts(str(tmp_path / "a.jsonl"), 8, 1) == ["one"]
    for content, said in (("{}", "line 1 must be"), ("[", "line 1 is not JSON"), ("", "no text")):
        (tmp_path / "b.jsonl").write_text(content)
        with pytest.raises(ValueError, match=said):
            read_texts(str(tmp_path / "b.jsonl"), 8, None)
    for name, said in (("x.pdf", "must be a"), ("x.csv", "does not exist")):
        with pytest.raises(ValueError, match=said):
            read_texts(str(tmp_path / name), 8, None)
    words = [f"data.{kind}={write_text(tmp_path / 'x.txt', 99, 2)}" for kind in ("train", "valid")]
    words += ["data.tokenizer_name_or_path=text8", f"data.cache_dir={tmp_path}"]
    found = read_texts("files", 16, 5, words)
    assert len(found) == 5
    whole = (tmp_path / "x.txt").read_text()
    assert all(len(text) == 16 and text in whole for text in found)
