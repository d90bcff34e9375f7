"""Optimizer steps, EMA and learning rates against recorded runs of the authors' trainer.

Each run is fed its recorded corruptions (x_t, t), so nothing random is left.
"""

import lightning as L
import pytest
import torch
from conftest import GOLDEN, load, load_json
from networks import CHECKPOINTS, MASK, loss_at, recorded
from torch.utils.data import DataLoader

from checkpointing.layouts import read_checkpoint
from checkpointing.load import load_pretrained
from diffusion import ClippingSettings, Diffusion, NoiseSettings
from noise_schedule import get_schedule
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.sedd import ScoreEntropy
from training.checkpoint_io.files import SafeCheckpointIO
from training.lr_schedules import lr_factor
from training.optimizers import OptimizerSettings

RUNS = load_json("optim/steps.json")


class Replay(Diffusion):
    """The module with recorded corruptions instead of drawn ones; notes what every step did."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.steps = []
        self.micro_losses = []

    def token_loss(self, batch, interval, noise, training):
        x0, mask = batch["x0"], batch["attention_mask"]
        if isinstance(self.objective, Autoregressive):
            return self.objective.loss(self.backbone, x0, mask, training=training)
        x_t, t = batch["model_input"][:, : x0.shape[1]], batch["t"]
        loss_mask = self.objective.loss_mask(mask, training)
        if isinstance(self.objective, ScoreEntropy):
            return loss_at(self.objective, self.backbone, x0, x_t, t, loss_mask)
        t = t[:, :: self.objective.block_size]
        return loss_at(self.objective, self.backbone, x0, x_t, t, loss_mask, interval=interval)

    def training_step(self, batch, batch_idx):
        loss = self.token_loss(batch, self.interval, None, True).mean
        self.micro_losses.append(float(loss.detach()))
        return loss

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        used = optimizer.param_groups[0]["lr"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.steps.append(
            {
                "lr": used,
                "losses": self.micro_losses,
                "updates": self.ema.num_updates,
                "params": {n: p.detach().clone() for n, p in self.backbone.named_parameters()},
                "ema": {n: p.clone() for n, p in self.ema.shadow.items()},
            }
        )
        self.micro_losses = []


def micro_batches(name):
    """The recorded micro-batches of a run, in order."""
    tensors, batches = load(f"optim/{name}.safetensors"), []
    for step in range(len(RUNS[name]["steps"])):
        for part in range(RUNS[name]["steps"][step]["micro_batches"]):
            prefix = f"step{step}.mb{part}."
            found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            batches.append(found)
    return batches


def objective_of(checkpoint, run):
    schedule = get_schedule("loglinear")
    if checkpoint["algo"] == "ar":
        return Autoregressive(MASK)
    if checkpoint["algo"] == "sedd":
        return ScoreEntropy(MASK, schedule)
    resample = "training.resample=true" in run["overrides"]
    return MaskedDiffusion(MASK, checkpoint["block_size"], schedule, resample=resample)


def factor_of(run):
    schedule, lr = run["lr_scheduler"], run["optim"]["lr"]
    if "Cosine" in schedule["_target_"]:
        return lr_factor(
            "cosine_decay_warmup",
            lr=lr,
            max_steps=schedule["t_initial"] + schedule["warmup_t"],
            warmup_steps=schedule["warmup_t"],
            lr_init=schedule["warmup_lr_init"],
            lr_min=schedule["lr_min"],
        )
    return lr_factor(
        "constant_warmup",
        lr=lr,
        max_steps=0,
        warmup_steps=schedule["num_warmup_steps"],
        lr_init=None,
        lr_min=None,
    )


def replay(name, tmp_path):
    """Run it; returns the module with its steps."""
    run = RUNS[name]
    checkpoint, optim = CHECKPOINTS[run["checkpoint"]], run["optim"]
    overrides = dict(o.split("=") for o in run["overrides"])
    interval = tuple(
        float(overrides.get(f"training.sampling_eps_{end}", default))
        for end, default in (("min", 1e-3), ("max", 1.0))
    )
    batches = micro_batches(name)
    size = len(batches[0]["x0"]) * run["accumulate_grad_batches"]
    module = Replay(
        backbone=recorded(run["checkpoint"]).train(),
        objective=objective_of(checkpoint, run),
        noise=NoiseSettings(
            seed=1,
            interval=interval,
            sampling_eps=1e-3,
            antithetic=True,
            global_batch=size,
            eval_global_batch=size,
        ),
        optimizer=OptimizerSettings(
            {
                "lr": optim["lr"],
                "betas": (optim["beta1"], optim["beta2"]),
                "eps": optim["eps"],
                "weight_decay": optim["weight_decay"],
            }
        ),
        lr_factor=factor_of(run),
        ema_decay=run["ema_decay"],
        clip=ClippingSettings((), 0.05, False) if checkpoint["algo"] == "bd3lm" else None,
    )
    path = str(GOLDEN / "checkpoints" / f"{run['checkpoint']}.ckpt")
    if run["start"] == "from_pretrained":
        taken = load_pretrained(module.backbone, read_checkpoint(path), algo="bamdlm")
        module.ema.load(taken.ema, taken.ema_updates)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=run["steps"][-1]["step"],
        accumulate_grad_batches=run["accumulate_grad_batches"],
        gradient_clip_val=run["gradient_clip_val"],
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        plugins=[SafeCheckpointIO()],
        default_root_dir=tmp_path,
    )
    loader = DataLoader(Endless(batches), batch_size=None)
    trainer.fit(module, loader, ckpt_path=path if run["start"] == "resume" else None)
    return module


class Endless(torch.utils.data.IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from ({**batch, "row": torch.arange(len(batch["x0"]))} for batch in self.batches)


@pytest.mark.parametrize("name", RUNS)
def test_training_repeats_the_recorded_run(name, tmp_path):
    module = replay(name, tmp_path)
    wanted = RUNS[name]["steps"]
    assert len(module.steps) == len(wanted)
    for ours, theirs in zip(module.steps, wanted, strict=True):
        assert ours["lr"] == pytest.approx(theirs["lr_used"], rel=1e-6, abs=1e-12)
        assert ours["losses"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["updates"] == theirs["ema_num_updates"]
        for kind in ("params", "ema"):
            for key, figures in theirs[kind].items():
                tensor = ours[kind][key.removeprefix("backbone.")].double()
                assert tensor.flatten()[:3].tolist() == pytest.approx(figures["first"], abs=1e-4)
                assert float(tensor.norm()) == pytest.approx(figures["l2"], abs=1e-4, rel=1e-4)
                # a sum of n entries, each within 1e-4, their errors not all of one sign
                spread = 1e-4 * tensor.numel() ** 0.5 + 1e-4
                assert float(tensor.sum()) == pytest.approx(figures["sum"], abs=spread)


def test_finetuning_ends_with_the_recorded_weights_and_averages(tmp_path):
    module = replay("finetune", tmp_path)
    wanted = load("optim/finetune.safetensors")
    for name, parameter in module.backbone.named_parameters():
        for prefix, ours in (("final", parameter), ("final_ema", module.ema.shadow[name])):
            theirs = wanted[f"{prefix}.backbone.{name}"]
            torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["constant", "constant_warmup", "cosine_decay_warmup"])
def test_learning_rates_are_the_recorded_ones(name):
    wanted = load_json("optim/lr.json")[name]
    settings = wanted["config"]
    warmup = settings.get("num_warmup_steps", settings.get("warmup_t", 0))
    factor = lr_factor(
        name,
        lr=wanted["base_lr"],
        max_steps=settings.get("t_initial", 0) + warmup,
        warmup_steps=warmup,
        lr_init=settings.get("warmup_lr_init"),
        lr_min=settings.get("lr_min"),
    )
    ours = [wanted["base_lr"] * factor(step) for step in range(len(wanted["lr_at_step"]))]
    assert ours == pytest.approx(wanted["lr_at_step"], rel=1e-9)
