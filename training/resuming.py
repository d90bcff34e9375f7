"""What a checkpoint must hold for a run to go on from it, looked at before anything starts.

Optimizers and Lightning believe what they are given: a moment of another shape or stride is written
beyond its end, and a counter that is text fails when its step comes.
"""

import math
import re
import reprlib
from collections.abc import Iterator

import lightning as L
import torch
from torch import Tensor, nn

from checkpointing.checkpoint import Checkpoint, section
from checkpointing.restricted_pickle import CheckpointError
from objectives.counts import FLOOR, CountLaw
from training.optimizers import STATES, OptimizerSettings, shared_out

LARGEST = 1 << 62
FLAGS = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused")
RATES = ("lr", "initial_lr", "eps", "weight_decay")
# Of the counters: where validation_due looks.
COUNTED = {
    "epoch_loop.batch_progress": ("completed", "processed"),
    "epoch_loop.val_loop.batch_progress": ("processed", "started"),
}


def check_resumable(checkpoint: Checkpoint, module: L.LightningModule, trainer: L.Trainer) -> None:
    """CheckpointError where the run cannot go on from it; tensors of the optimizer may be on the
    meta device."""
    if problem := next(problems(checkpoint, module, trainer), None):
        raise CheckpointError(f"{checkpoint.source} cannot be resumed from: {problem}")


def check_optimizer(states, module: L.LightningModule) -> None:
    """The same of optimizer states whose numbers are there."""
    if problem := next(optimizer(states, module.backbone, module.optimizer_settings), None):
        raise CheckpointError(f"the checkpoint cannot be resumed from: {problem}")


def problems(checkpoint: Checkpoint, module, trainer) -> Iterator[str]:
    raw = checkpoint.raw
    for name, kind in (("global_step", 0), ("epoch", 0), ("sampler", {}), ("loops", {})):
        value = raw.get(name, None if name != "sampler" else {})
        if not like(value, kind):
            yield f"{name} is {reprlib.repr(value)}"
    seen = section(raw, "sampler").get("examples_seen", 0)
    if not like(seen, 0):
        yield f"sampler.examples_seen is {reprlib.repr(seen)}"
    if not checkpoint.config:
        yield "it holds no settings of its run (hyper_parameters)"
    by = section(checkpoint.config, "eval").get("likelihood") or []
    if not isinstance(by, list) or not all(isinstance(name, str) for name in by):
        yield f"its config has eval.likelihood={reprlib.repr(by)}"
    version = raw.get("pytorch-lightning_version")
    if not isinstance(version, str) or not re.fullmatch(r"\d+\.\d+[\w.+-]{,40}", version):
        yield f"pytorch-lightning_version is {reprlib.repr(version)}"
    yield from weights(raw["state_dict"], module)
    yield from loops(raw["loops"], trainer)
    yield from callbacks(raw.get("callbacks", {}), trainer)
    settings = module.optimizer_settings
    yield from schedules(raw.get("lr_schedulers"), len(shared_out(module.backbone, settings)))
    yield from optimizer(checkpoint.optimizer, module.backbone, settings)
    yield from average(checkpoint, module)
    yield from count_law(raw.get("count_law"), module.count_law)


def like(theirs, ours) -> bool:
    """Whether a plain value is of the kind of one of ours. None stands for a score or a name that
    is not known yet; numbers are finite and not negative."""
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and all(
            like(theirs[k], ours[k]) for k in ours if k in theirs
        )
    if isinstance(ours, str | bool | list):
        return isinstance(theirs, type(ours))
    if isinstance(ours, int):
        return type(theirs) is int and 0 <= theirs < LARGEST
    if isinstance(theirs, Tensor):
        return theirs.numel() == 1 and not theirs.is_complex()
    if ours is None and (theirs is None or isinstance(theirs, str)):
        return True
    return type(theirs) in (int, float) and abs(theirs) < LARGEST


def weights(state: dict, module) -> Iterator[str]:
    """Names and shapes; Lightning would list them over a page."""
    expected = {name.replace("_orig_mod.", ""): v for name, v in module.state_dict().items()}
    if odd := sorted(map(str, expected.keys() ^ state.keys())):
        yield f"its weights are of another network: {', '.join(odd[:3])} and {len(odd)} in all"
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != expected[name].shape:
            yield f"the weights {name} are of another network"


def loops(theirs: dict, trainer) -> Iterator[str]:
    fit = section(theirs, "fit_loop")
    if not like(fit, trainer.fit_loop.state_dict()):
        yield "its loops hold no counters"
    for name, counts in COUNTED.items():
        total = section(section(fit, name), "total")
        if not all(like(total.get(count), 0) for count in counts):
            yield f"its loops have no {name}"


def callbacks(theirs, trainer) -> Iterator[str]:
    if not isinstance(theirs, dict):
        yield "its callbacks are no dict"
    for callback in trainer.callbacks:
        state = theirs.get(callback.state_key, {})
        scores = section(state, "best_k_models") if isinstance(state, dict) else {}
        if not like(state, callback.state_dict()) or not all(
            isinstance(name, str) and like(score, 0.0) for name, score in scores.items()
        ):
            yield f"its callbacks hold no state of {type(callback).__name__}"


def schedules(theirs, groups: int) -> Iterator[str]:
    """Ours, or the authors', who keep no step. groups: of the optimizer, a learning rate each."""
    kinds = {"last_epoch": 0, "_step_count": 0, "base_lrs": [], "_last_lr": [], "base_values": []}
    if not isinstance(theirs, list) or len(theirs) != 1 or not like(theirs[0], kinds):
        yield "its lr_schedulers are not those of one optimizer"
    names = ("base_lrs", "_last_lr", "base_values")
    rates = [theirs[0].get(name, [0.0] * groups) for name in names]
    if not all(len(each) == groups and all(like(x, 0.0) for x in each) for each in rates):
        yield "its lr_schedulers have no learning rate"
    if not {"last_epoch", "base_values"} & theirs[0].keys():
        yield "its lr_schedulers have no step"


def optimizer(theirs, backbone: nn.Module, settings: OptimizerSettings) -> Iterator[str]:
    """One optimizer of our groups, which are numbered one after another; its tensors have the
    shapes of the weights, one number after another."""
    parts = shared_out(backbone, settings)
    count = sum(map(len, parts.values()))
    if not isinstance(theirs, list) or len(theirs) != 1 or not isinstance(theirs[0], dict):
        yield "it has no state of one optimizer"
    groups, states = theirs[0].get("param_groups"), theirs[0].get("state")
    if not isinstance(groups, list) or len(groups) != len(parts):
        yield f"its optimizer has not {len(parts)} groups of parameters: {' and '.join(parts)}"
    if not isinstance(states, dict) or (states and states.keys() != set(range(count))):
        yield f"its optimizer is not that of {count} parameters"
    first = 0
    for (kind, weights), theirs in zip(parts.items(), groups, strict=True):
        numbers = range(first, first + len(weights))
        if not isinstance(theirs, dict) or theirs.get("params") != list(numbers):
            yield f"its optimizer is not that of {count} parameters"
        yield from adamw_group(theirs) if kind == "adamw" else muon_group(theirs, settings)
        for number, weight in zip(numbers, weights, strict=True):
            if states:
                yield from state(states[number], kind, number, weight)
        first += len(weights)


def state(theirs, kind: str, number: int, weight: Tensor) -> Iterator[str]:
    counted = kind == "adamw"
    kinds = {*STATES[kind], *(["step"] if counted else [])}
    if not isinstance(theirs, dict) or theirs.keys() != kinds:
        yield f"its optimizer has no state of {kind} for parameter {number}"
    if counted:
        step = theirs["step"]
        if not like(step, 0.0):
            yield f"its optimizer has no state of {kind} for parameter {number}"
        if not (isinstance(step, Tensor) and step.is_meta) and not 0 <= float(step) < LARGEST:
            yield f"its optimizer counts {float(step)} steps for parameter {number}"
    for name in STATES[kind]:
        if trouble := moment(theirs[name], weight):
            yield f"its optimizer's {name} of parameter {number} is {trouble}"


def moment(theirs, parameter: Tensor) -> str | None:
    """What is wrong with it."""
    if not isinstance(theirs, Tensor) or not theirs.is_floating_point():
        return f"{reprlib.repr(theirs)}, no tensor of floating-point numbers"
    if theirs.dtype not in (parameter.dtype, torch.float64):  # the latter loses nothing
        return f"of {theirs.dtype}"
    if theirs.shape != parameter.shape:
        return f"of shape {list(theirs.shape)}, not {list(parameter.shape)}"
    return None if theirs.is_contiguous() else f"of strides {theirs.stride()}"


def adamw_group(theirs: dict) -> Iterator[str]:
    rates = [theirs.get(name, math.nan if name == "lr" else 0.0) for name in RATES]
    betas = theirs.get("betas")
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        yield f"its optimizer has the betas {reprlib.repr(betas)}"
    if not all(like(rate, 0.0) for rate in (*rates, *betas)) or not max(betas) < 1:
        yield f"its optimizer has the numbers {reprlib.repr((*rates, *betas))}"
    flags = [theirs.get(name) for name in FLAGS]
    if not all(flag is None or isinstance(flag, bool) for flag in flags) or theirs.get("amsgrad"):
        yield "its optimizer is not our AdamW"


def muon_group(theirs: dict, settings: OptimizerSettings) -> Iterator[str]:
    """Its learning rate is of the schedule; all else is as we would make it."""
    rates = [theirs.get(name, math.nan) for name in ("lr", "initial_lr")]
    if not all(like(rate, 0.0) for rate in rates):
        yield f"its optimizer has the numbers {reprlib.repr(rates)}"
    weight = nn.Parameter(torch.zeros(1, 1))
    (ours,) = torch.optim.Muon([weight], **settings.muon).param_groups
    fixed = ours.keys() - {"lr", "params"}
    if theirs.keys() - {"initial_lr"} != ours.keys() or any(
        type(theirs[key]) is not type(ours[key]) or theirs[key] != ours[key] for key in fixed
    ):
        yield "its optimizer is not our Muon"


def average(checkpoint: Checkpoint, module) -> Iterator[str]:
    raw = checkpoint.raw
    if module.ema is not None and checkpoint.ema_problem is not None:
        yield checkpoint.ema_problem
    bounds = [raw.get(name) for name in ("sampling_eps_min", "sampling_eps_max")]
    if module.clip is not None and not (
        all(isinstance(bound, Tensor | float) and like(bound, 0.0) for bound in bounds)
        and 0 <= float(bounds[0]) <= float(bounds[1]) <= 1
    ):
        yield f"sampling_eps_min and sampling_eps_max are {reprlib.repr(bounds)}"


def count_law(theirs, ours: CountLaw | None) -> Iterator[str]:
    """Of a run with noise by counts: as many numbers as ours, of mean 1, none below 0; where they
    make the weights all are above 0."""
    if ours is None:
        return
    kind = (ours.density.dtype, ours.density.shape)
    if not isinstance(theirs, Tensor) or (theirs.dtype, theirs.shape) != kind:
        yield f"it has no count_law of {len(ours.density)} numbers"
    elif not (abs(float(theirs.mean()) - 1) < 1e-9 and float(theirs.min()) >= 0) or (
        ours.reweighted and float(theirs.min()) < FLOOR / 2
    ):
        yield f"its count_law is {reprlib.repr(theirs.tolist())}"
