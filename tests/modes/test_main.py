"""main.py from the command line to the files: train, evaluate and sample, all four algorithms."""

import csv
import gc
import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from runs import ALGORITHMS, ends_with_2, run, tiny, write_text

import main
import settings
from checkpointing.layouts import read_checkpoint
from data.tokenizer import get_tokenizer
from diffusion import Diffusion
from models.dit import DiT
from models.masks import BlockDiffusion, Causal, Full
from modes.build import build_objective
from modes.build_data import build_data
from objectives.corruption import draw_example_noise
from random_streams import key
from training.log_reading import read_log

ROOT = Path(__file__).parents[2]
EVALUATE = ["mode=ppl_eval"]
SAMPLE = ["mode=sample_eval", "eval.gen_ppl_eval_model_name_or_path=null"]
BLOCK, LENGTH, STEPS = 4, 16, 10
TOKENIZER = get_tokenizer("text8")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("_launch_folder")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [*tiny(folder), "trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """algorithm -> (overrides of the run, its folder)"""
    made = {}

    def make(algo):
        if algo not in made:
            folder = tmp_path_factory.mktemp(algo)
            words = [*base, *ALGORITHMS[algo], f"checkpointing.save_dir={folder}"]
            assert main.main(words) == 0
            made[algo] = words, folder
        return made[algo]

    return make


def last(folder) -> str:
    return str(folder / "checkpoints/last.ckpt")


def files(*folders) -> dict:
    """Every file and when it was written."""
    found = (path for folder in folders for path in Path(folder).rglob("*"))
    return {str(path): path.stat().st_mtime_ns for path in found}


def evaluated(words, folder, *more) -> dict:
    """What ppl_eval writes about the checkpoint of `folder`."""
    assert main.main([*words, *EVALUATE, f"eval.checkpoint_path={last(folder)}", *more]) == 0
    (newest,) = sorted(folder.glob("ppl_*.json"), key=lambda p: p.stat().st_mtime_ns)[-1:]
    return json.loads(newest.read_text())


def refused(words, capsys, *watched) -> str:
    """The message of a command that must end with 2 and write nothing."""
    before = files(Path.cwd(), *watched)
    message = ends_with_2(words, capsys)
    assert files(Path.cwd(), *watched) == before
    assert message.startswith("this run cannot start:\n  - ")
    assert message.count("\n  - ") == 1
    assert "Traceback" not in message
    return message


# ---- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_training_leaves_checkpoints_a_log_and_its_settings(trained, algo):
    _, folder = trained(algo)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "best.ckpt", "step=8.ckpt", "step=10.ckpt"}
    assert {p.name for p in folder.iterdir()} >= {"settings.json", "metrics.csv"}
    assert not (folder / "wandb").exists()  # wandb=null
    log = read_log(folder / "metrics.csv")
    assert sorted(log["trainer/loss"]) == list(range(1, STEPS + 1))
    assert all(map(math.isfinite, log["trainer/loss"].values()))
    assert len(log["val/ppl"]) == 2  # trainer.val_check_interval counts micro-batches
    assert read_checkpoint(last(folder)).step == STEPS


def test_the_same_command_goes_on_and_trains_nothing_twice(trained, tmp_path, monkeypatch, capsys):
    whole, folder = trained("bamdlm")
    words = [*whole, f"checkpointing.save_dir={tmp_path / 'run'}"]
    calls = []
    step = Diffusion.training_step
    monkeypatch.setattr(Diffusion, "training_step", lambda *args: (calls.append(1), step(*args))[1])
    assert main.main([*words, "trainer.max_steps=6"]) == 0
    assert len(calls) == 6 * 2  # two micro-batches
    assert main.main(words) == 0
    assert len(calls) == STEPS * 2
    out = capsys.readouterr().out
    assert "going on from step 6 of" in out
    assert "nothing is left to train" not in out
    assert f"trained to step {STEPS}; checkpoints: {tmp_path / 'run'}/checkpoints\n" in out
    ours, theirs = read_checkpoint(last(tmp_path / "run")), read_checkpoint(last(folder))
    assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in theirs.weights)
    before = files(tmp_path / "run/checkpoints")
    assert main.main(words) == 0
    assert len(calls) == STEPS * 2
    out = capsys.readouterr().out
    assert f"nothing is left to train: trainer.max_steps={STEPS}" in out
    assert "trained to step" not in out
    assert files(tmp_path / "run/checkpoints") == before
    with (tmp_path / "run/metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, STEPS + 1))


def test_a_share_of_no_validation_batch_is_refused(base, tmp_path, capsys):
    words = [*base, *ALGORITHMS["ar"], f"checkpointing.save_dir={tmp_path / 'run'}"]
    message = refused([*words, "trainer.limit_val_batches=0.01"], capsys)
    assert re.search(r"limit_val_batches=0.01 of \d+ validation batches of 4 rows is less", message)


def test_each_figure_is_said_once(trained, capsys):
    """The perplexity of an evaluation; and no count of FLOPs that nobody made."""
    words, folder = trained("ar")
    capsys.readouterr()
    evaluated(words, folder)
    assert len(re.findall("perplexity", capsys.readouterr().out)) == 1
    more = ["trainer.enable_model_summary=true", "trainer.max_steps=3"]
    assert main.main([*words, *more, f"checkpointing.save_dir={folder / 'b'}"]) == 0
    summary = capsys.readouterr().out
    assert re.search(r"backbone +│ DiT +│ +[\d.]+ K", summary)
    assert re.search(r"^[\d,]+ parameters$", summary, re.M)
    assert "FLOPs" not in summary


@pytest.mark.parametrize(
    ("change", "was"),
    [
        ("optim.lr=1e-3", "optim.lr=0.001 (the checkpoint has 0.01)"),
        ("block_size=8", "block_size=8 (the checkpoint has 4)"),
        ("training.ema=0.5", "training.ema=0.5 (the checkpoint has 0.9999)"),
        ("seed=2", "seed=2 (the checkpoint has 1)"),
    ],
)
def test_another_run_is_not_taken_up(trained, change, was, capsys):
    words, folder = trained("bamdlm")
    message = refused([*words, change], capsys, folder)
    assert "belongs to a run with other settings" in message
    assert was in message
    assert message.count("the checkpoint has") == 1
    assert "checkpointing.resume_from_ckpt=false" in message


def test_what_does_not_shape_training_may_differ(trained, tmp_path, capsys):
    words, folder = trained("ar")
    capsys.readouterr()
    others = ["trainer.log_every_n_steps=5", "loader.batch_size=8", "trainer.max_steps=11"]
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", folder, copy], check=True)
    assert main.main([*words, *others, f"checkpointing.save_dir={copy}"]) == 0
    assert f"going on from step {STEPS}" in capsys.readouterr().out
    assert read_checkpoint(last(copy)).step == STEPS + 1


# ---- evaluation -------------------------------------------------------------------------------


def network(checkpoint, algo, *, averaged=True) -> DiT:
    """From the file alone, without the code that loads checkpoints into networks."""
    raw = torch.load(checkpoint, weights_only=True)
    model = raw["hyper_parameters"]["config"]["model"]
    names = ("hidden_size", "cond_dim", "n_blocks", "n_heads")
    sizes = {name: model[name] for name in names}
    net = DiT(vocab_size=TOKENIZER.vocab_size, **sizes, dropout=0.0, adaln=algo != "ar")
    weights = {
        name.removeprefix("backbone."): value
        for name, value in raw["state_dict"].items()
        if name.startswith("backbone.")
    }
    net.load_state_dict(weights)
    if averaged:
        with torch.no_grad():
            for parameter, mean in zip(net.parameters(), raw["ema"]["shadow_params"], strict=True):
                parameter.copy_(mean)
    return net.eval()


def packed(path) -> torch.Tensor:
    """A text as rows: its tokens and EOS in pieces, BOS and EOS round each, the rest dropped."""
    stream = [*TOKENIZER.encode(Path(path).read_text()), TOKENIZER.eos_id]
    room = LENGTH - 2
    pieces = [stream[i : i + room] for i in range(0, len(stream) - room + 1, room)]
    return torch.tensor([[TOKENIZER.bos_id, *piece, TOKENIZER.eos_id] for piece in pieces])


def log_softmax(logits):
    logits = logits.double()
    logits[..., TOKENIZER.mask_id] = -torch.inf
    return logits.log_softmax(-1)


@torch.no_grad()
def nats_per_token(net, algo, x0) -> float:
    """The NELBO under the run's own draws of times and masks, formula by formula."""
    if algo == "ar":
        logits = net.logits(net.hidden(x0[:, :-1], None, attention_mask=Causal()))
        return -float(log_softmax(logits).gather(-1, x0[:, 1:, None]).mean())
    size = BLOCK if algo == "bamdlm" else LENGTH
    noise = draw_example_noise(
        key(1, "evaluate", 0),
        torch.arange(len(x0)),
        global_batch=8,
        length=LENGTH,
        block_size=size,
        antithetic=True,
    )
    t = (1e-3 + noise.time * (1 - 1e-3)).repeat_interleave(size, 1)  # loglinear: p = t
    hidden = noise.token <= t
    hidden[:, 0] = False
    x_t = torch.where(hidden, TOKENIZER.mask_id, x0)
    if algo == "bamdlm":
        states = net.hidden(torch.cat([x_t, x0], 1), None, attention_mask=BlockDiffusion(BLOCK))
        logits = net.logits(states[:, :LENGTH])
    elif algo == "mdlm":
        logits = net.logits(net.hidden(x_t, None, attention_mask=Full()))
    else:
        return score_entropy(net, x_t, x0, t[:, 0], hidden)
    nll = -log_softmax(logits).gather(-1, x0[..., None])[..., 0]
    return float((nll / t)[hidden].sum() / (len(x0) * (LENGTH - 1)))


def score_entropy(net, x_t, x0, t, hidden) -> float:
    sigma = -torch.log1p(-t)
    logits = net.logits(net.hidden(x_t, sigma, attention_mask=Full()), sigma)
    expm1 = (1 / (1 / t.double() - 1))[:, None]  # e^sigma = 1 / (1 - t)
    log_score = logits.double() - expm1[..., None].log() - math.log(TOKENIZER.vocab_size - 1)
    picked = log_score.gather(-1, x0[..., None])[..., 0]
    log_score[..., TOKENIZER.mask_id] = -torch.inf
    ratio = 1 / expm1
    loss = log_score.exp().sum(-1) - ratio * picked + ratio * (ratio.log() - 1)
    rate = 1 / (1 - t.double())[:, None]  # d sigma / d t
    return float((rate * loss)[hidden].sum() / (len(x0) * (LENGTH - 1)))


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("averaged", [True, False], ids=["ema", "raw"])
def test_perplexity_is_that_of_the_checkpoint(trained, base, algo, averaged, capsys):
    words, folder = trained(algo)
    more = f"eval.disable_ema={not averaged}", "eval.likelihood=nelbo"
    found = evaluated(words, folder, *(more if algo != "ar" else more[:1]))
    x0 = packed(next(w for w in base if w.startswith("data.valid=")).partition("=")[2])
    by_hand = nats_per_token(network(last(folder), algo, averaged=averaged), algo, x0)
    assert found["tokens"] == len(x0) * (LENGTH - 1)
    assert found["nll"] == pytest.approx(by_hand, rel=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(by_hand), rel=1e-5)
    assert found["bound"] == ("exact" if algo == "ar" else "upper bound (NELBO)")
    assert f"perplexity {found['ppl']:.3f} ± {found['ppl_error']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("algo", ["bamdlm", "ar"])
def test_perplexity_does_not_depend_on_the_batch(trained, algo):
    words, folder = trained(algo)
    plain = evaluated(words, folder)
    for rows in (1, 3, 20):  # the noise is that of batches of 8
        found = evaluated(words, folder, f"eval.tokens_per_batch={rows * LENGTH + 1}")
        assert found["nll"] == pytest.approx(plain["nll"], rel=1e-6)
        assert found["rows"] == plain["rows"]


def test_a_batch_holds_a_row_at_least(trained, capsys):
    words, folder = trained("ar")
    words = [*words, "mode=ppl_eval", f"eval.checkpoint_path={last(folder)}"]
    message = refused([*words, f"eval.tokens_per_batch={LENGTH - 1}"], capsys)
    assert f"eval.tokens_per_batch={LENGTH - 1} is less than a row" in message


# ---- sampling ---------------------------------------------------------------------------------

CACHED = ("ar", "bamdlm")


def texts(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_sampling_writes_a_row_a_text_and_does_nothing_twice(trained, algo, tmp_path, capsys):
    words, folder = trained(algo)
    words = [
        *(w for w in words if "clip_search" not in w),
        *SAMPLE,
        f"eval.checkpoint_path={last(folder)}",
        f"sampling.logdir={tmp_path / 'plain.csv'}",
        "sampling.num_sample_batches=2",
        "sampling.batch_size=2",
    ]
    length = 3 * LENGTH if algo in CACHED else LENGTH  # beyond the trained length
    more = {"sedd": ["algo.T=8"], "mdlm": []}.get(algo, [f"sampling.context_size={length}"])
    words += [f"model.length={length}", *more]
    assert main.main(words) == 0
    rows = texts(tmp_path / "plain.csv")
    assert sorted(int(row["row"]) for row in rows) == [0, 1, 2, 3]
    assert len({row["samples"] for row in rows}) == 4
    for row in rows:
        ids = TOKENIZER.encode(row["samples"].removeprefix("[BOS]"))
        assert 0 < float(row["gen_entropy"]) <= math.log(length)
        assert TOKENIZER.mask_id not in ids
        assert int(row["gen_nfes"]) <= (8 + 1 if algo == "sedd" else length)
        assert row["gen_ppl"] == ""  # no judge
    before = files(tmp_path)
    assert main.main(words) == 0
    assert "nothing to do" in capsys.readouterr().out
    after = files(tmp_path)
    assert after[str(tmp_path / "plain.csv")] == before[str(tmp_path / "plain.csv")]
    cached = [*words, "sampling.kv_cache=true", f"sampling.logdir={tmp_path / 'cached.csv'}"]
    if algo not in CACHED:
        assert "sampling.kv_cache=True is exact for bamdlm and ar" in refused(cached, capsys)
        return
    assert main.main(cached) == 0
    pairs = (
        sorted((row["row"], row["samples"]) for row in texts(tmp_path / f"{name}.csv"))
        for name in ("plain", "cached")
    )
    assert next(pairs) == next(pairs)


# ---- checkpoints that do not fit --------------------------------------------------------------

UNFIT = [
    (["model.hidden_size=32"], "model.hidden_size=16 in the file"),
    (["model.n_blocks=3"], "model.n_blocks differs"),
    (["model.n_heads=4"], "model.n_heads differs"),
    (["model.cond_dim=4"], "model.cond_dim differs"),
    (["data.tokenizer_name_or_path={golden}/tokenizer"], "data.tokenizer_name_or_path"),
]


@pytest.mark.parametrize(("words", "cause"), UNFIT, ids=[w[0].split("=")[0] for w, _ in UNFIT])
@pytest.mark.parametrize("mode", ["train", "ppl_eval", "sample_eval"])
def test_sizes_that_disagree_with_the_checkpoint(trained, mode, words, cause, tmp_path, capsys):
    run, folder = trained("bamdlm")
    checkpoint = {
        "train": [f"training.from_pretrained={last(folder)}"],
        "ppl_eval": [*EVALUATE, f"eval.checkpoint_path={last(folder)}"],
        "sample_eval": [*SAMPLE, f"eval.checkpoint_path={last(folder)}"],
    }[mode]
    words = [word.format(golden=GOLDEN) for word in words]
    here = [f"checkpointing.save_dir={tmp_path / 'new'}", f"sampling.logdir={tmp_path / 'texts'}"]
    message = refused([*run, *here, *checkpoint, *words], capsys, folder)
    assert cause in message
    assert last(folder) in message


def test_another_algorithm_is_not_evaluated(base, trained, capsys):
    _, folder = trained("bamdlm")
    asked = [*base, *EVALUATE, f"eval.checkpoint_path={last(folder)}", "algo=mdlm"]
    cause = "set algo=bamdlm, or start a new run with training.from_pretrained"
    assert cause in refused(asked, capsys, folder)


def test_another_block_size_is_evaluated_and_sampled_with_a_note(trained, tmp_path, capsys):
    words, folder = trained("bamdlm")
    found = {}
    for size in (4, 8):
        here = [f"checkpointing.save_dir={tmp_path / 'run'}", f"block_size={size}"]
        asked = [*words, *EVALUATE, f"eval.checkpoint_path={last(folder)}", *here]
        assert main.main(asked) == 0
        said = capsys.readouterr().out
        assert ("block_size=8: the network was trained at 4\n" in said) == (size == 8)
    for path in (tmp_path / "run").glob("ppl_*.json"):
        found[8 if path.stem.endswith("-S8") else 4] = json.loads(path.read_text())
    assert found[8]["block_size"] == 8
    assert found[8]["nll"] != found[4]["nll"]
    asked = [*words, *SAMPLE, f"eval.checkpoint_path={last(folder)}", "block_size=8"]
    assert main.main([*asked, f"sampling.logdir={tmp_path / 'texts'}"]) == 0
    assert "block_size=8: the network was trained at 4\n" in capsys.readouterr().out


def test_a_file_that_is_no_checkpoint(base, tmp_path, capsys):
    (tmp_path / "notes.ckpt").write_text("not weights")
    words = [*base, "algo=ar", *EVALUATE, f"eval.checkpoint_path={tmp_path / 'notes.ckpt'}"]
    assert "notes.ckpt" in refused(words, capsys)


def test_the_refusal_is_one_of_the_command_too(trained, tmp_path):
    words, _ = trained("bamdlm")
    log = tmp_path / "log"
    code, said = run([*words, "optim.lr=1e-3", "model.hidden_size=32"], log)
    assert code == 2
    assert said.startswith("this run cannot start:\n  - ")  # nothing on stdout before or after
    assert said.rstrip().count("\n") == 1
    assert (
        "model.hidden_size=32 (the checkpoint has 16); optim.lr=0.001 (the checkpoint has 0.01)"
        in said
    )
    assert list(tmp_path.iterdir()) == [log]


# ---- data -------------------------------------------------------------------------------------


@pytest.fixture
def documents(tmp_path):
    """Texts of different lengths, one a line, all shorter than a row."""
    lines = ["one two", "the king", "of love and", "day", "night time", "a queen"]
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path, lines


def without_wrapping(path) -> list[str]:
    return ["data.wrap=false", f"data.train={path}", f"data.valid={path}"]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_padding_does_not_count(base, documents, algo, tmp_path):
    """Without wrapping a row is a document: tokens counted are those after BOS; and for ar, whose
    loss is exact, more padding changes nothing."""
    path, lines = documents
    run = [*base, *ALGORITHMS[algo], *without_wrapping(path), "trainer.max_steps=2"]
    run.append(f"checkpointing.save_dir={tmp_path / 'run'}")
    assert main.main(run) == 0
    found = evaluated(run, tmp_path / "run")
    assert found["tokens"] == sum(len(line) + 1 for line in lines)  # and EOS
    assert found["rows"] == len(lines)
    assert math.isfinite(found["ppl"])
    if algo == "ar":
        longer = evaluated(run, tmp_path / "run", "model.length=32")
        assert longer["tokens"] == found["tokens"]
        assert longer["nll"] == pytest.approx(found["nll"], rel=1e-5)


def test_the_same_text_in_any_kind_of_file(trained, tmp_path):
    import pyarrow
    from pyarrow import parquet

    words, folder = trained("ar")
    text = write_text(tmp_path / "a.txt", 100, 3).read_text()
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n")
    parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / "c.parquet")
    found = [
        evaluated(words, folder, f"data.valid={tmp_path / name}")
        for name in ("a.txt", "b.jsonl", "c.parquet")
    ]
    assert len({(each["nll"], each["tokens"]) for each in found}) == 1
    assert found[0]["tokens"] == len(packed(tmp_path / "a.txt")) * (LENGTH - 1)


def test_text8_from_a_file_that_is_there_already(base, tmp_path):
    """Its download is looked for in the cache first, so that it can be put there by hand."""
    downloads = tmp_path / "cache/downloads"
    downloads.mkdir(parents=True)
    text = write_text(tmp_path / "words", 2000, 4).read_text()
    with zipfile.ZipFile(downloads / "text8.zip", "w") as archive:
        archive.writestr("text8", text)
    words = [w for w in base if not w.startswith(("data.train", "data.valid", "data=files"))]
    words += ["algo=ar", f"data.cache_dir={tmp_path / 'cache'}", "trainer.max_steps=2"]
    for corpus in ("text8", "text8-crop"):
        run = tmp_path / corpus
        assert main.main([f"data={corpus}", *words, f"checkpointing.save_dir={run}"]) == 0
        assert read_checkpoint(last(run)).step == 2
    for special, ends in ((True, [TOKENIZER.bos_id, TOKENIZER.eos_id]), (False, None)):
        ids = window_of_ar(words, special)
        assert ids.shape == (4, LENGTH + 1)  # L tokens are predicted, as published
        assert all((row[[0, -1]].tolist() == ends) == special for row in ids)


def window_of_ar(words, special: bool):
    """The first batch of text8-crop with algo=ar."""
    config = settings.load(["data=text8-crop", *words, f"data.insert_train_special={special}"])
    data = build_data(config, TOKENIZER, train=True)
    batch = next(iter(data.train_dataloader()))
    objective = build_objective(config, TOKENIZER.mask_id)
    inputs = objective.loss_inputs(batch["input_ids"], batch["attention_mask"], training=True)
    assert inputs.tokens.shape == inputs.loss_mask.shape == (4, LENGTH)
    assert inputs.loss_mask.all()
    return batch["input_ids"]


def test_what_is_imported_is_no_work_for_the_collector(monkeypatch):
    """Once: what is garbage by then would stay, as it may in a process that runs several."""
    before = gc.get_freeze_count()
    with main.imports():  # of a process that has them
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
    monkeypatch.delitem(sys.modules, "lightning")
    try:
        with main.imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
