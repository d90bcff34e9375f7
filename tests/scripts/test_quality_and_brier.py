"""scripts/quality.py and scripts/brier.py on recorded checkpoints."""

import json

import numpy as np
import pytest
from checkpoint_helpers import recorded_file

from evaluation.judge import load_judge
from evaluation.mauve import ceiling_halves, mauve
from evaluation.quality import diversity, mean, perplexity
from sampling.notebook import load
from sampling.run import Model, Output, SamplingRun, Texts
from sampling.sample_file import SampleFile
from scripts import brier, quality

LINES = [f"the work of the {a} and the {b}" for a in ("king", "day", "night") for b in "abcdefgh"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "real.txt").write_text("\n".join(LINES))
    return {name: recorded_file(name, folder) for name in ("ar", "mdlm")} | {"folder": folder}


def words(files):
    return ["--", f"data.cache_dir={files['folder'] / 'cache'}"]


def test_every_figure_of_every_run_beside_real_texts(files, tmp_path, capsys):
    writer, file = load(files["ar"]), SampleFile(tmp_path / "samples.csv")
    judge = load_judge(files["ar"])
    for run, temperature in (("hot", 1.0), ("cold", 0.5)):
        params = writer.params.changed(length=12, batch_size=8, temperature=temperature)
        model = Model(writer.algo, writer.denoise, writer.tokenizer, params)
        SamplingRun(model, Texts(8), Output(file, run)).run()
    command = [str(file.path), f"--judge={files['ar']}", "--device=cpu", "--clusterings=2"]
    command += [f"--reference={files['folder'] / 'real.txt'}", f"--features={tmp_path / 'kept'}"]
    command += [f"--out={tmp_path / 'found.json'}", *words(files)]
    assert quality.main(command) == 0
    found = json.loads((tmp_path / "found.json").read_text())["figures"]
    assert list(found) == ["hot ar", "cold ar", "real texts"]
    texts = [row.samples for row in file.rows("hot").values()]
    scores, ids = judge.score(texts), judge.tokenize(texts)
    expected = {
        "gen_ppl": perplexity(scores),
        "entropy": mean([s.entropy for s in scores]),
        "length": mean([s.tokens for s in scores]),
        **diversity(ids, judge.eos_id),
    }
    hot = found["hot ar"]
    for name, figure in expected.items():
        assert hot[name]["value"] == pytest.approx(figure.value), name
        if figure.error == figure.error:
            assert hot[name]["error"] == pytest.approx(figure.error), name
    assert hot["gen_nfes"]["value"] == 11
    assert hot["tokens_per_evaluation"]["value"] == 1
    # MAUVE of as many real texts, and two sets of real ones
    one, two = ceiling_halves(8, 16)  # 16 lines are read for 8 texts
    real = judge.last_states(judge.tokenize(LINES[:16])).numpy()
    own = judge.last_states(ids).numpy()
    of_run, ceiling = (
        mauve(own, real[one], clusterings=2),
        mauve(real[two], real[one], clusterings=2),
    )
    name = of_run.name("ar")
    assert name == "mauve-2x2-n8-ar"
    assert hot[name]["value"] == pytest.approx(of_run.mean, rel=1e-5)
    assert found["real texts"][name]["value"] == pytest.approx(ceiling.mean, rel=1e-5)
    said = capsys.readouterr().out
    assert said.count("features of") == 3  # two runs and the real ones
    assert quality.main(command) == 0
    assert "features of" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["seed", "batch_size", "bos_id"])
def test_brier_takes_no_number_that_has_an_option_or_that_the_network_decides(name, capsys):
    with pytest.raises(SystemExit) as caught:
        brier.main(["x.ckpt", "--reference=x", f"--set={name}=3"])
    assert caught.value.code == 2
    assert f"{name} is none of" in capsys.readouterr().err


def test_brier_of_two_checkpoints(files, tmp_path, capsys):
    out = tmp_path / "found.json"
    command = [files["ar"], files["mdlm"], f"--reference={files['folder'] / 'real.txt'}"]
    command += ["--draws=24", "--set=num_steps=4", "--set=steps=ancestral", "--device=cpu"]
    assert brier.main([*command, f"--out={out}", *words(files)]) == 0
    found = json.loads(out.read_text())
    ar, mdlm = found.values()
    assert f"BrierLM-n{len(LINES)}" in ar
    # 24 prefixes of 24 draws against the probabilities of the same prefixes
    drawn, exact = ar["Brier-1"], ar["Brier-1 exact"]
    assert abs(drawn["value"] - exact["value"]) < 0.03
    assert "Brier-1 exact" not in mdlm
    assert np.isfinite(mdlm["Brier-1"]["value"])
    said = capsys.readouterr().out
    assert "Brier-4" in said
    few = ar[f"BrierLM-n{len(LINES)}"]["value"] is None
    assert ("take more --prefixes or --draws" in said) == few


def test_brier_of_blocks_of_any_size(tmp_path, files, capsys):
    path = recorded_file("bd3lm_bs4", tmp_path)
    command = [path, f"--reference={files['folder'] / 'real.txt'}", "--set=temperature=0"]
    found = []
    for more in ([], ["--set=block_size=8"]):
        out = tmp_path / f"found{len(more)}.json"
        assert brier.main([*command, *more, f"--out={out}", "--device=cpu", *words(files)]) == 0
        said = capsys.readouterr().out
        assert ("block_size=8: the network was trained at 4\n" in said) == bool(more)
        found.append(json.loads(out.read_text()))
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("script", "more", "said"),
    [
        (quality, ["no.csv", "--judge=x"], "no.csv does not exist"),
        (quality, ["real.txt", "--judge=mdlm.ckpt"], "--judge='mdlm.ckpt' cannot be used"),
        (quality, ["real.txt", "--judge=ar.ckpt", "--reference=none.txt"], "none.txt does not"),
        (
            quality,
            ["real.txt", "--judge=ar.ckpt", "--reference=real.txt", "--featurizer=./none"],
            "--featurizer='./none' cannot be loaded",
        ),
        (
            quality,
            ["real.txt", "--judge=none", "--reference=real.txt", "--buckets=49"],
            "--buckets 49: MAUVE would have clusters of at most 48 texts",
        ),
        (brier, ["none.ckpt", "--reference=real.txt"], "none.ckpt"),
        (
            brier,
            ["ar.ckpt", "mdlm.ckpt", "--reference=none.txt", "--set=threshold=0.5"],
            "--set threshold: no checkpoint reads it",
        ),
        (brier, ["ar.ckpt", "--reference=none.txt", "--set=steps=confidence"], "--set steps: no"),
        (brier, ["ar.ckpt", "--reference=real.txt", "--set=steps=best"], "sampling.steps='best'"),
        (brier, ["ar.ckpt", "--reference=short.txt"], "fewer than two texts"),
        (
            brier,
            ["ar.ckpt", "--reference=real.txt", "--set=block_size=4"],
            "--set block_size: ar.ckpt holds ar weights, without blocks",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_line(script, more, said, files, capsys, monkeypatch):
    monkeypatch.chdir(files["folder"])
    (files["folder"] / "short.txt").write_text("a\nb\n")
    assert script.main([*more, *words(files)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
