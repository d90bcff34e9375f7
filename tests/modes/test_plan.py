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
from runs import run, tiny
from torch.utils.flop_counter import FlopCounterMode

import settings
from models.masks import BlockDiffusion, Causal, Full
from modes import plan as plan_mode
from modes.build import _layers, build_backbone, build_shape
from modes.plan import Weights, counted, on_gpus, plan, report
from modes.planning import fitting
from modes.planning.gpus import MFU, REACHED, Gpu, room
from noise_schedule import get_schedule
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import draw_example_noise
from scripts.show_mask import document_ids_of
from scripts.show_mask import main as show_mask
from scripts.show_mask import seen_pairs as drawn_pairs
from training.csv_log import CSVLog
from training.flops import (
    GPUS,
    PEAK_SIZE,
    NetworkShape,
    flops,
    matmul_dtype,
    matmul_peak,
    nominal_peak,
    seen_pairs,
)
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
    monkeypatch.setattr("training.flops.PEAK_TRIES", 6)  # all of them, twice
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
    return plan(settings.load([*PLANNED, *words]), SMALL, Weights(170_000_000))


def test_a_plan_adds_up():
    made = planned("trainer.devices=8")
    assert made.tokens == 10 * 512 * 1024
    assert made.flops == pytest.approx(10 * 512 * flops(SMALL).step)
    assert made.weights == 170e6 * 22  # weights, gradients, moments, average, copy in two bytes
    assert made.hours(4e14) == pytest.approx(made.flops / 4e14 / 8 / 0.955 / 3600)
    assert planned().hours(4e14) == pytest.approx(made.flops / 4e14 / 3600)
    assert planned("loader.batch_size=32").activations == 2 * made.activations
    assert planned("training.ema=0").weights == 170e6 * 18
    by_muon = plan(settings.load(PLANNED), SMALL, Weights(170_000_000, by_muon=100_000_000))
    assert by_muon.weights == 170e6 * 22 - 4 * 100e6  # those have one moment
    assert (made.checkpoint, by_muon.checkpoint) == (170e6 * 16, 170e6 * 16 - 4 * 100e6)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_checkpoint_has_the_bytes_that_were_planned(optim, tmp_path, capsys):
    words = [*tiny(tmp_path), "model.hidden_size=128", "model.n_heads=4", f"optim={optim}"]
    words += ["trainer.max_steps=1", f"checkpointing.save_dir={tmp_path / 'run'}"]
    code, said = run(words, tmp_path / "log")
    assert code == 0, said
    size = (tmp_path / "run/checkpoints/last.ckpt").stat().st_size
    plan_mode.prepare(settings.load([*words, "mode=plan"]))()
    said = capsys.readouterr().out.partition("a checkpoint: ")[2].split()
    assert float(said[0]) * 2**20 == pytest.approx(size, rel=0.02)  # the rest: names, settings


def test_what_fsdp_shares_out_and_sends():
    """By hand, of 8 devices: 12 layers of 5M, which are one unit, and 110M outside of them, two
    micro-batches."""
    words = ["strategy=fsdp", "trainer.devices=8", "loader.batch_size=32"]
    config, count = settings.load([*PLANNED, *words]), Weights(170_000_000, outside=110_000_000)
    made = plan(config, SMALL, count)
    assert made.weights == 170e6 * 22 / 8
    assert made.gathered == 2 * (4 * 110e6 + 2 * 60e6)
    larger = plan(config, SMALL, Weights(710_000_000, outside=110_000_000))  # 100 MB a layer
    assert larger.gathered == 2 * (4 * 110e6 + 2 * 100e6)
    sent = 2 * 2 * 600e6 + 110e6 * 4 + 710e6 * 4  # layers twice, the rest once, gradients
    assert larger.exchange == pytest.approx(2 * sent * 7 / 8)
    sent = 60e6 * 2 + 110e6 * 4 + 170e6 * 4  # layers once
    assert made.exchange == pytest.approx(2 * sent * 7 / 8)
    config.strategy.replicate = 2  # groups of 4; between them, gradients of each device's part
    of_two = plan(config, SMALL, count)
    assert of_two.weights == 170e6 * 22 / 4
    assert of_two.exchange == pytest.approx(2 * (sent * 3 / 4 + 170e6 * 4 / 4))
    config.strategy.replicate = 1
    text = "\n".join(report(made, config))
    assert f"; {16 * 170e6 / 8 / 2**30:.2f} GiB per device with checkpointing.format=sh" in text
    config = settings.load([*PLANNED, *words[:1], "checkpointing.format=sharded"])
    assert f"; {16 * 170e6 / 8 / 2**30:.2f} GiB per device with" in "\n".join(report(made, config))
    ddp = planned("trainer.devices=8", "loader.batch_size=32")
    assert ddp.exchange == pytest.approx(2 * 7 / 8 * 4 * 170e6)
    assert (ddp.gathered, planned().exchange) == (0, 0)
    half = planned("trainer.devices=8", "loader.batch_size=32", "strategy.gradients=bf16")
    assert half.exchange == ddp.exchange / 2


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
    assert (
        plan(config, SMALL, Weights(170_000_000, frozen=169_000_000)).weights
        == 170e6 * 2 + 1e6 * 18
    )


def test_a_plan_reads_well():
    config = settings.load([*PLANNED, "trainer.devices=8"])
    made = plan(config, SMALL, Weights(170_000_000))
    text = "\n".join(report(made, config))
    assert "170.0M parameters, sequences of 1024 in blocks of 16" in text
    assert "memory per device" in text
    assert "a checkpoint: 2.53 GiB\n" in text
    assert "exchange: each device sends 1.11 GiB per optimizer step (strategy=ddp, 8" in text
    lines = on_gpus(made, config, Gpu("this GPU", 80e9, 4e14, "measured 400 TFLOP/s"))
    assert lines[0].startswith("on 8 × this GPU: fits; ")
    assert lines[1] == f"estimated training time: {3600 * made.hours(4e14 * 0.469):.3g} seconds"
    assert "at 46.9% (MFU) of a matrix product's speed (measured 400 TFLOP/s)" in lines[2]


TEXT8 = ["mode=plan", "data=text8", "model=tiny", "model.length=64", "wandb=null"]
TEXT8 += ["block_size=4", "data.tokenizer_name_or_path=text8", "trainer.max_steps=5000"]


def printed(capsys, *words):
    made = settings.load([*TEXT8, *words])
    assert settings.check(made) == ([], [])
    plan_mode.prepare(made)()
    return capsys.readouterr().out


def test_mode_plan_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = printed(capsys)
    assert "in blocks of 4" in said
    assert "whether it fits, and hours: add plan.gpu=RTX4090-24GB|L40S-48GB|" in said
    assert "estimated training time" not in said  # of no GPU
    assert not list(tmp_path.iterdir())


def test_a_plan_for_gpus_that_are_named(capsys):
    config = settings.load([*TEXT8, "plan.gpu=H100-80GB", "plan.nodes=4"])
    trainer = config.trainer
    assert (trainer.num_nodes, trainer.devices, trainer.accelerator) == (4, 8, "gpu")
    assert (trainer.precision, config.loader.batch_size) == ("bf16-mixed", 16)
    said = printed(capsys, "plan.gpu=H100-80GB", "plan.nodes=4")
    assert "on 4 nodes with 8 × H100-80GB: fits; " in said
    assert "(77% of 989 TFLOP/s)" in said
    assert "several nodes were not measured" in said
    said = printed(capsys, "plan.gpu=A100-40GB", "algo=sedd", "block_size=64", "trainer.devices=2")
    assert "on 2 × A100-40GB: fits; " in said
    assert "sedd was not measured on a GPU: the figure is that of mdlm" in said


def test_the_hours_are_those_that_were_measured():
    """324 363 tokens/s of bamdlm and 525 581 of mdlm, on one H200 faster than REACHED says."""
    peak = GPUS["H200-141GB"]["peak"] * 1e12 * REACHED
    for algo, size, rate in (("bamdlm", 16, 324_363), ("mdlm", 1024, 525_581)):
        cost = flops(NetworkShape(algo, 768, 12, 50_258, 1024, size)).step / 1024
        assert peak * MFU[algo][0] / cost == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize(
    ("algo", "compiled", "rows", "measured"),
    [
        *(("bamdlm", True, 32, 21.2), ("bamdlm", False, 32, 21.3), ("bamdlm", True, 16, 12.4)),
        *(("bamdlm", True, 64, 39.0), ("bamdlm", True, 128, 74.4), ("mdlm", True, 32, 12.5)),
        *(("mdlm", False, 32, 12.6), ("ar", True, 32, 12.8), ("ar", False, 32, 12.8)),
    ],
)
def test_the_memory_is_that_which_was_measured_by_kernels(algo, compiled, rows, measured):
    """GiB of docs/performance.md: model=small, rows of 1024, on an H200."""
    size = {"bamdlm": 16, "mdlm": 1024, "ar": 1}[algo]
    words = [f"algo={algo}", f"block_size={size}", f"model.compile={compiled}", "mode=plan"]
    words += ["plan.gpu=H200-141GB", f"loader.global_batch_size={rows}"]
    words += [f"loader.batch_size={rows}"]
    count = Weights(162_246_482 if algo == "ar" else 169_627_218)
    made = plan(settings.load(words), NetworkShape(algo, 768, 12, 50_258, 1024, size), count)
    assert made.memory / 2**30 == pytest.approx(measured, rel=0.05)


SMOL = ["algo.backbone=llama", "model=llama-135m", "model.length=512", "loader.batch_size=16"]


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        *(("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA GeForce RTX 4090", 165.2e12)),
        *(("NVIDIA H100 PCIe", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA T4", None)),
    ],
)
def test_what_the_maker_states_is_known_of_one_form_alone(name, stated, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert nominal_peak(cuda, torch.bfloat16) == stated
    assert nominal_peak(cuda, torch.float32) is None
    assert nominal_peak(torch.device("cpu"), torch.bfloat16) is None


COUNTS = "training.noise=counts"
ON_AN_H200 = {  # docs/results.md: settings, ids of the vocabulary with the mask, GiB
    "bamdlm": ([*SMOL, "block_size=4", "training.noise=counts"], 49_153, 12.2),
    "two views": (
        [*SMOL, "block_size=16", "training.noise=counts", "training.views=2"],
        49_153,
        16.5,
    ),
    "ar": ([*SMOL, "algo=ar"], 49_153, 7.9),
}


@pytest.mark.parametrize("case", ON_AN_H200)
def test_the_memory_is_that_which_was_measured_on_an_h200(case):
    """With SmolLM2's shape, compiled."""
    words, ids, measured = ON_AN_H200[case]
    words = ["mode=plan", "plan.gpu=H200-141GB", "model.compile=true", *words]
    config = settings.load([*words, "loader.global_batch_size=32"])
    with torch.device("meta"):
        backbone = build_backbone(config, SimpleNamespace(vocab_size=ids), None)
    made = plan(config, build_shape(config, backbone), counted(backbone, config))
    assert made.memory / 2**30 == pytest.approx(measured, rel=0.1)


NOT_FITTING = {  # what is added to the command, and the changes that are named
    ("model=small", "model.length=128"): [
        {"model.activation_checkpointing"},
        {"loader.batch_size"},
    ],
    ("loader.batch_size=1", "model=medium", "model.length=24576"): [
        {"model.activation_checkpointing"}
    ],
    (
        *("loader.batch_size=1", "model.hidden_size=2048", "model.n_blocks=48"),
        *("trainer.devices=8", "trainer.accelerator=gpu"),
    ): [{"strategy"}],
    ("loader.batch_size=1", "model.hidden_size=4096", "model.n_blocks=48"): [
        {"model.activation_checkpointing", "loader.batch_size", "model.n_blocks"}
    ],
}


@pytest.mark.parametrize("words", NOT_FITTING)
def test_what_makes_it_fit_is_planned(words, capsys):
    gpu = "plan.gpu=RTX4090-24GB"
    said = printed(capsys, gpu, *words, "model.n_heads=16")
    assert "does not fit; " in said
    listed = said.partition("to make it fit, one of these:\n")[2].splitlines()
    ways = [line.rpartition(": ") for line in listed if "GiB" in line]
    changes = [way.split() for way, _, _ in ways]
    assert [{word.split("=")[0] for word in change} for change in changes] == NOT_FITTING[words]
    for change in changes:  # the command with the change fits, as it is said
        kept = [word for word in words if word.split("=")[0] not in " ".join(change)]
        assert ": fits; " in printed(capsys, gpu, *kept, *change, "model.n_heads=16")


def test_the_largest_batch_is_taken_that_fits():
    config = settings.load([*PLANNED, "trainer.devices=2", "loader.batch_size=128"])

    def made(config):
        return plan(config, SMALL, Weights(170_000_000))

    limit = made(fitting.changed(config, {"loader.batch_size": 64})).memory
    assert {"loader.batch_size": 64} in fitting.ways(config, made, limit)
    assert {"loader.batch_size": 32} in fitting.ways(config, made, limit - 1)
    whole = room(GPUS["H200-141GB"]["memory"] * 1e9)
    assert "  as it is, on " in fitting.advice(config, made, whole / 2)[-1]


def test_what_a_plan_cannot_do_is_said():
    _, problems, _ = settings.examine([*TEXT8, "plan.gpu=H100"])
    assert any("plan.gpu=H100 must be one of RTX4090-24GB, L40S-48GB" in each for each in problems)
    words = [*TEXT8, "plan.gpu=H100-80GB", "trainer.accelerator=cpu"]
    _, problems, _ = settings.examine(words)
    assert problems == [
        "trainer.accelerator=cpu: plan.gpu=H100-80GB is a GPU; leave one of them out"
    ]
    _, _, notes = settings.examine([*TEXT8, "plan.nodes=2", "trainer.num_nodes=4"])
    assert "trainer.num_nodes has no effect: it is planned for plan.nodes=2" in notes
    _, _, notes = settings.examine([*TEXT8[1:], "plan.gpu=H100-80GB"])
    assert "plan.gpu has no effect: mode=train plans nothing" in notes


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


def test_every_figure_of_the_steps_goes_to_the_log_at_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("training.logged.nominal_peak", lambda device, dtype: 1e15)
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
