"""What a run costs: FLOPs as they are computed, the plan, the log, the picture of the mask."""

import csv
import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from networks import small, small_llama, texts
from torch.utils.flop_counter import FlopCounterMode

import settings
from models.masks import BlockDiffusion, Causal, Full
from modes import plan as plan_mode
from modes.build import _layers
from modes.plan import plan, report
from noise_schedule import get_schedule
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import draw_example_noise
from scripts.show_mask import document_ids_of
from scripts.show_mask import main as show_mask
from scripts.show_mask import seen_pairs as drawn_pairs
from training.csv_log import CSVLog
from training.flops import PEAK_SIZE, NetworkShape, flops, matmul_dtype, matmul_peak, seen_pairs
from training.log_reading import read_log
from training.logged import LOGGED, StepLog

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", [1, 4, 12, 24])
def test_pairs_are_those_of_the_rule(size):
    length, index = 24, torch.arange(48)
    inner, last = seen_pairs(NetworkShape("bamdlm", 16, 2, 7, length, size))
    if size == length:
        assert (inner, last) == (length**2, length**2)
        return
    allowed = BlockDiffusion(size).allowed(index[:, None], index[None], 2 * length)
    assert (inner, last) == (int(allowed.sum()), int(allowed[:length].sum()))
    two, index = BlockDiffusion(size, views=2), torch.arange(3 * length)
    allowed = two.allowed(index[:, None], index[None], 3 * length)
    found = seen_pairs(NetworkShape("bamdlm", 16, 2, 7, length, size, views=2))
    assert found == (int(allowed.sum()), int(allowed[: 2 * length].sum()))


def test_of_several_block_sizes_pairs_are_the_mean_by_their_shares():
    """Rows of the whole length too are passes over both halves."""
    sizes = {1: 0.25, 4: 0.5, 24: 0.25}
    index = torch.arange(48)
    found = seen_pairs(NetworkShape("bamdlm", 16, 2, 7, 24, 4, sizes=sizes))
    masks = [BlockDiffusion(size).allowed(index[:, None], index[None], 48) for size in sizes]
    rows = [len(index), 24]
    wanted = [
        sum(share * int(m[:n].sum()) for m, share in zip(masks, sizes.values(), strict=True))
        for n in rows
    ]
    assert found == tuple(wanted)


def test_pairs_of_ar_are_causal():
    index = torch.arange(24)
    seen = int(Causal().allowed(index[:, None], index[None], 24).sum())
    assert seen_pairs(NetworkShape("ar", 16, 2, 7, 24, 1)) == (seen, seen)
    assert int(Full().allowed(index[:, None], index[None], 24).sum()) == 24**2


NETWORKS = {"dit": {"hidden_size": 16}, "llama": {"hidden_size": 24, "ffn_size": 40}}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("algo", ["bamdlm", "mdlm", "ar"])
def test_the_flop_model_counts_what_torch_counts(algo, kind):
    """Forward pass without attention, where the counter does not know what the mask leaves out."""
    rows, length, vocab, width = 2, 32, 101, NETWORKS[kind]["hidden_size"]
    make = small_llama if kind == "llama" else partial(small, adaln=algo != "ar")
    net = make(vocab, n_blocks=3, **NETWORKS[kind])
    x0, ones = texts(rows, length, vocab - 1), torch.ones(rows, length)
    size = 4 if algo == "bamdlm" else length
    if algo == "ar":
        objective, share = Autoregressive(vocab - 1), 1.0

        def run():
            return objective.loss(net, x0, ones, training=True)
    else:
        objective = MaskedDiffusion(vocab - 1, size, get_schedule("loglinear"), ignore_bos=False)
        settings = {"length": length, "block_size": size, "antithetic": True}
        noise = draw_example_noise(1, torch.arange(rows), global_batch=rows, **settings)
        x_t, _ = objective.corrupt(x0, noise, (1e-3, 1.0))
        share = float((x_t == vocab - 1).float().mean())

        def run():
            return objective.loss(net, x0, ones, noise, interval=(1e-3, 1.0), training=True)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    products = ("aten.mm", "aten.addmm")
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in products)
    made = flops(NetworkShape(algo, width, 3, vocab, length, size, share, **_layers(net)))
    assert rows * (made.layers + made.head) == pytest.approx(counted, rel=0.04)


def test_the_peak_is_that_of_the_fastest_matrix_product(monkeypatch):
    ends = itertools.cycle([0.0, 4.0, 4.0, 6.0, 6.0, 9.0])  # products of 4, 2 and 3 seconds
    monkeypatch.setattr("training.flops.time.perf_counter", lambda: next(ends))
    monkeypatch.setitem(PEAK_SIZE, "cpu", 8)
    assert matmul_peak(torch.device("cpu"), torch.float32) == 2 * 8**3 / 2.0


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", torch.bfloat16),
        ("16-mixed", torch.float16),
        ("32-true", torch.float32),
    ],
)
def test_matrix_products_are_made_in(precision, dtype):
    assert matmul_dtype(precision) == dtype


SMALL = NetworkShape("bamdlm", 768, 12, 50_258, 1024, 16)


PLANNED = ["trainer.accelerator=cpu", "trainer.precision=bf16", "loader.global_batch_size=512"]
PLANNED += ["loader.batch_size=16", "trainer.max_steps=10"]


def planned(*words):
    """Of ten steps in bf16, on a CPU."""
    return plan(settings.load([*PLANNED, *words]), SMALL, 170_000_000)


def test_a_plan_adds_up():
    made = planned("trainer.devices=8")
    assert made.tokens == 10 * 512 * 1024
    assert made.flops == pytest.approx(10 * 512 * flops(SMALL).step)
    assert made.weights == 170e6 * 22  # weights, gradients, moments, average, copy in two bytes
    assert made.hours(1e15) == pytest.approx(made.flops / 1e15 / 0.4 / 8 / 3600)
    assert planned("loader.batch_size=32").activations == 2 * made.activations
    assert planned("strategy=fsdp", "trainer.devices=8").weights == made.weights / 8
    groups = planned("strategy=fsdp", "trainer.devices=8", "strategy.replicate=2")
    assert groups.weights == made.weights / 4
    assert planned("training.ema=0").weights == 170e6 * 18
    by_muon = plan(settings.load(PLANNED), SMALL, 170_000_000, by_muon=100_000_000)
    assert by_muon.weights == 170e6 * 22 - 4 * 100e6  # those have one moment


def test_a_plan_of_weights_in_bfloat16():
    """Two bytes each; if trained, a master, a gradient, two moments, an average. Where passes or
    devices are summed, their gradients are in float32 too."""
    half = "model.param_dtype=bfloat16"
    once = planned(half, "loader.global_batch_size=16")
    assert once.weights == 170e6 * (2 + 4 + 2 + 8 + 4)
    assert planned(half).weights == 170e6 * (2 + 4 + 2 + 4 + 8 + 4)
    assert planned(half, "trainer.devices=2", "loader.global_batch_size=32").weights == 170e6 * 24
    assert planned(half, "training.ema=0").weights == 170e6 * 20
    config = settings.load([*PLANNED, half, "loader.global_batch_size=16"])
    assert plan(config, SMALL, 170_000_000, frozen=169_000_000).weights == 170e6 * 2 + 1e6 * 18


def test_a_plan_reads_well():
    text = report(planned("trainer.devices=8"), peak=4e14)
    assert "170.0M parameters, sequences of 1024 in blocks of 16" in text
    assert "memory per device" in text
    assert "8 × this GPU (measured 400 TFLOP/s)" in text
    assert "8 × H100" in text
    assert "this GPU" not in report(planned(), peak=None)


def test_mode_plan_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    overrides = ["mode=plan", "data=text8", "model=tiny", "model.length=64", "block_size=4"]
    made = settings.load([*overrides, "wandb=null", "trainer.max_steps=5000"])
    assert settings.check(made) == ([], [])
    plan_mode.prepare(made)()
    printed = capsys.readouterr().out
    assert "in blocks of 4" in printed
    assert "estimated training time, at 40% of the device's peak (MFU):\n  1 × H100" in printed
    assert "this GPU" not in printed  # there is none
    assert not list(tmp_path.iterdir())


class StandIn:
    """As much of a trainer as the callback reads."""

    is_global_zero, log_every_n_steps, global_step = True, 2, 0
    sanity_checking, state = True, SimpleNamespace(fn=None)

    def __init__(self, path):
        self.loggers = [CSVLog(path)]


class Module:
    device = torch.device("cpu")
    norm, loss = torch.tensor(0.5), torch.tensor(2.5)
    health = SimpleNamespace(loss=loss, bad_steps=3, norm=norm, masked=0.25, ar_loss=norm)
    objective = SimpleNamespace(ar_loss=0.5)


class Optimizer:
    param_groups = ({"lr": 0.1},)


def test_every_figure_of_the_steps_goes_to_the_log_at_its_steps(tmp_path):
    trainer, callback = StandIn(tmp_path / "metrics.csv"), StepLog(1e9, torch.float32, rates=True)
    callback.on_train_start(trainer, Module)
    for step in range(1, 6):
        trainer.global_step = step
        callback.on_before_optimizer_step(trainer, Module, Optimizer)
        callback.on_validation_start(trainer, Module)
        callback.on_validation_end(trainer, Module)
        callback.on_train_batch_end(trainer, Module, None, {"input_ids": texts(3, 8, 5)}, step - 1)
    log = read_log(tmp_path / "metrics.csv")
    assert log.keys() == {name for name, entry in LOGGED.items() if not entry.validation}
    known = {
        "diffusion_loss": 2.25,
        "ar_loss": 0.5,
        "loss": 2.5,
        "lr": 0.1,
        "bad_steps": 3,
        "grad_norm": 0.5,
        "masked_share": 0.25,
    }
    for name, value in known.items():
        assert log[f"trainer/{name}"] == {2: pytest.approx(value), 4: pytest.approx(value)}
    for name in log:
        assert list(log[name]) == [2, 4]
        assert all(value > 0 for value in log[name].values())
    with (tmp_path / "metrics.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 2


def test_the_mask_is_drawn(tmp_path, capsys):
    path = tmp_path / "mask.png"
    assert (
        show_mask(["--length", "16", "--block-size", "4", "--tile", "4", "--out", str(path)]) == 0
    )
    assert path.read_bytes()[:4] == b"\x89PNG"
    shares = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[:4])
    # 4 own + (0 + 1 + 2 + 3) earlier + (1 + 2 + 3 + 4) clean blocks of 64 in all
    assert shares == {"seen": "31.25%", "dense": "100.00%", "sdpa": "100.00%", "flex": "31.25%"}


def test_the_picture_of_the_mask_shows_documents(tmp_path, capsys):
    """Pairs of one document alone; padding is a text of its own."""
    row = document_ids_of([3, 4], 8, 4)
    assert row.tolist() == [[1, 1, 1, 0, 2, 2, 2, 2] * 2]
    seen = drawn_pairs(8, 4, row)
    assert (seen == (row[0][:, None] == row[0]) & drawn_pairs(8, 4)).all()
    path = tmp_path / "mask.png"
    words = ["--length", "8", "--block-size", "4", "--out", str(path)]
    assert show_mask([*words, "--documents", "3", "4"]) == 0
    assert f"{2 * (9 + 1 + 16) / 256:.2%}" in capsys.readouterr().out
    assert path.is_file()
    with pytest.raises(SystemExit):
        show_mask([*words, "--documents", "5", "4"])
    assert "--documents: 4 tokens do not fit from place 8 of a row of 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "10", "--block-size", "4"], "--block-size 4 does not divide --length 10"),
        (["--length", "8192"], "at most 4096"),
        (["--out", "mask.jpg"], "must end in .png"),
    ],
)
def test_what_cannot_be_drawn_is_said(arguments, message, capsys):
    with pytest.raises(SystemExit):
        show_mask(arguments)
    assert message in capsys.readouterr().err


TINY = ["--hidden", "16", "--blocks", "2", "--heads", "2", "--vocab", "61", "--threads", "1"]


def result(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_benchmark_of_the_step_compares_equal_numbers(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import train_step

    arguments = [*TINY, "--block", "4", "--rounds", "1", "--shapes", "32x2", "--lengths", "16,32"]
    threads = torch.get_num_threads()
    assert train_step.main([*arguments, "--skip", "memory,overhead"]) == 0
    torch.set_num_threads(threads)
    cases = result(capsys)["cases"]
    assert [case["algo"] for case in cases] == ["bamdlm", "mdlm", "sedd", "ar"]
    for case in cases:
        assert case["loss_gap"] <= 1e-5
        assert case["gradient_gap"] <= 1e-5


def test_the_benchmark_of_the_likelihood_finds_the_same_perplexity(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import likelihood

    threads = torch.get_num_threads()
    assert (
        likelihood.main(
            [*TINY, "--length", "32", "--block", "4", "--batches", "2", "--rounds", "0"]
        )
        == 0
    )
    torch.set_num_threads(threads)
    for found in result(capsys)["algorithms"].values():
        assert found["gap"] <= 1e-4
