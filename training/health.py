"""Reports what goes wrong in a run: bad steps, failed ranks, data that do not come."""

import math
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from checkpointing.restricted_pickle import CheckpointError
from samplers.sending import Here, send
from training.distributed import norms_of, part
from training.run_lock import process_start
from training.signals import Stopped
from utils import Failure, atomic_file, reason, shown

TIDY_SECONDS = 15.0  # for a process of a failed job, until it is ended
STALL_SECONDS = 60.0  # without a batch, until a line says so
LAUNCHER = "BAMDLM_LAUNCHER"  # the variable that names the process which starts the others


class BadSteps(Failure):
    """Too many steps in a row had a loss or a gradient that is not finite."""


@dataclass
class StepHealth:
    """An optimizer step whose loss or gradient is not finite is left out: no weight, average or
    moment changes.

    At most `allowed` in a row are left out; one more ends the run. Their batches are written to
    `folder`.
    """

    allowed: int = 10
    folder: str | None = None
    late: bool = False  # the host judges a step during the next one, and waits for no device
    bad_steps: int = 0  # since the process began
    in_a_row: int = 0
    found: Tensor | None = None  # late: 1.0 if the step at hand is left out, float32 on the device
    skipped: bool = False  # not late: whether the step at hand is left out
    norm: Tensor | None = None  # of its gradient
    loss: Tensor | None = None  # its loss, over the global batch; on the device
    masked: float | None = None  # of its tokens that count, here; None where none are masked ever
    ar_loss: Tensor | None = None  # the part of it that is AR, without its factor
    factor: Tensor | None = None  # places / tokens that count in the global batch; None: 1
    _seen: list[tuple[dict, Tensor, Tensor]] = field(default_factory=list)
    _masked: float | None = None  # tokens of the step at hand
    _coming: deque = field(default_factory=deque)

    def saw(
        self, batch: dict, loss: Tensor, loss_mask: Tensor, masked: float | None = None
    ) -> None:
        """A micro-batch of the step at hand. loss: TokenLoss.parts on the device; loss_mask [B,
        L] on the host; masked: how many of its tokens that count are masked."""
        self._seen.append((batch, loss.detach(), loss_mask))
        if masked is not None:
            self._masked = (self._masked or 0) + masked

    def inspect(self, trainer: L.Trainer, named: list[tuple[str, Tensor]]) -> int:
        """Decide, over all devices together, whether the step is left out. Called for every step,
        also for one that is left out, whose loss may be NaN.

        Its gradients are dropped, or where the decision is `late` the optimizer is told by `found`
        not to use them. Returns what `settle` does.
        """
        norms = norms_of([p.grad for _, p in named])
        norm = torch.linalg.vector_norm(norms)
        batches, losses, masks = zip(*self._seen, strict=True) if self._seen else ((), (), ())
        self._seen = []
        self.masked = None
        if self._masked is not None:
            self.masked = self._masked / max(sum(float(mask.sum()) for mask in masks), 1)
        self._masked = None
        bad = self._over_all_devices(trainer.world_size, norm, losses, masks)
        self.norm = norm if self.factor is None else norm * self.factor
        names = [name for name, _ in named]
        numbers = torch.cat([bad.to(norms), norms])
        step = _Step(trainer.global_step + 1, batches, losses, names, *send(numbers))
        self._coming.append(step)
        self.found = bad.amax().clamp(max=1) if self.late else None
        learned = self.settle(trainer, leave=int(self.late))
        if self.skipped:
            for _, p in named:
                p.grad = None
        return learned

    def _over_all_devices(
        self, devices: int, norm: Tensor, losses: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> Tensor:
        """Sets `loss` and `factor`. Returns float32 [3], > 0 where a loss or the gradient is not
        finite, and where no token counts.

        Losses and gradients are means over places: of a micro-batch, then over micro-batches and
        devices. All micro-batches have the same size, so they are those of the global batch.
        """
        losses = torch.stack(losses or (norm.new_zeros(()),)).float()
        losses = losses.view(len(losses), -1)  # [micro-batches, parts]
        places = devices * sum(mask.numel() for mask in masks)  # all ranks have equally many
        absent = sum(int((mask == 0).sum()) for mask in masks)
        bad_loss, bad_norm = (~torch.isfinite(x).all() for x in (losses, norm))
        left_out = torch.full_like(losses[0, 0], absent)  # filled there: nothing is sent
        numbers = torch.stack([bad_loss.float(), bad_norm.float(), left_out, *losses.mean(0)])
        if devices > 1:
            torch.distributed.all_reduce(numbers)
        parts, counted = numbers[3:] / devices, places - numbers[2]
        # where every token counts it is 1; one device knows that without asking
        differs = absent or (places and devices > 1)
        self.factor = places / counted.clamp(min=1) if differs else None
        parts = parts if self.factor is None else parts * self.factor
        self.loss, self.ar_loss = parts[0], parts[1] if len(parts) > 1 else None
        nothing = (counted <= 0) if places else torch.zeros_like(bad_loss)
        return torch.cat([numbers[:2], nothing[None].float()])

    def settle(self, trainer: L.Trainer, leave: int = 0) -> int:
        """Judge the steps that are not judged yet, except the last `leave`. Returns how many
        earlier steps turn out to have been left out."""
        self.skipped = False
        before = self.bad_steps
        while len(self._coming) > leave:
            step = self._coming.popleft()
            step.arrived.synchronize()
            self._judge(trainer, step)
        return self.bad_steps - before if self.late else 0

    def _judge(self, trainer: L.Trainer, step: "_Step") -> None:
        loss_is_bad, gradient_is_bad, nothing_counts, *norms = step.numbers.tolist()
        if not (loss_is_bad or gradient_is_bad or nothing_counts):
            self.in_a_row = 0
            return
        self.skipped = not self.late
        if trainer.precision == "16-mixed" and not loss_is_bad and not nothing_counts:
            return  # the scaler of float16 finds its scale this way
        odd = [
            name for name, norm in zip(step.names, norms, strict=True) if not math.isfinite(norm)
        ]
        self.bad_steps += 1
        self.in_a_row += 1
        what = f"a {'loss' if loss_is_bad else 'gradient'} that is not finite"
        if nothing_counts:
            what = "no token that counts"
        message = f"step {step.number:,} left out: it has {what}"
        if self.folder is not None and self.in_a_row <= self.allowed + 1:
            name = f"step={step.number}-rank={trainer.global_rank}.pt"
            message += f" (batch in {self._keep(name, step, odd)})"
        if trainer.is_global_zero:
            print(f"{message}; {self.bad_steps} so far", file=sys.stderr, flush=True)
        if self.in_a_row > self.allowed:
            raise BadSteps(
                f"{self.in_a_row} steps in a row had {what}, more than"
                f" training.max_bad_steps={self.allowed}; first: {', '.join(odd[:3]) or what}."
                " What was saved before holds finite weights. A lower optim.lr or"
                " trainer.gradient_clip_val may help, in another checkpointing.save_dir"
            )

    def _keep(self, name: str, step: "_Step", odd: list[str]) -> str:
        path = Path(self.folder) / "bad_steps" / name
        kept = [{key: value.cpu() for key, value in batch.items()} for batch in step.batches]
        losses = [loss.cpu() for loss in step.losses]
        try:
            with atomic_file(path, "wb") as file:
                torch.save({"batches": kept, "losses": losses, "parameters": odd}, file)
        except (OSError, RuntimeError) as error:  # see CarefulIO
            return f"no file: {reason(error)}"
        return str(path)

    def scale(self, named: list[tuple[str, Tensor]], limit: float | None, algorithm: str) -> None:
        """The gradient of the mean over the tokens that count, clipped to trainer.gradient_clip_val
        by trainer.gradient_clip_algorithm: by norm in the same pass."""
        by_value = limit and algorithm == "value"
        factor = self.factor
        if limit and not by_value:  # as torch.nn.utils.clip_grads_with_norm_
            clipped = (limit / (self.norm + 1e-6)).clamp(max=1)
            factor = clipped if factor is None else clipped * factor
        if factor is not None:
            torch._foreach_mul_([part(p.grad) for _, p in named], factor.to(self.norm.dtype))
        if by_value:
            nn.utils.clip_grad_value_([p for _, p in named], limit)


@dataclass(frozen=True)
class _Step:
    """What is known of a step once `numbers` have arrived: whether a loss and whether the gradient
    is not finite, whether no token counts, and each parameter's norm ahead of `scale`."""

    number: int
    batches: Sequence[dict]
    losses: Sequence[Tensor]
    names: list[str]
    arrived: "torch.Event | Here"
    numbers: Tensor


class RankFailure(L.Callback):
    """Where one of several processes fails, prints its traceback first, or the line that says all,
    and ends it soon.

    Lightning's clean-up may wait for the other processes, and they may wait for this one.
    """

    def on_exception(self, trainer, pl_module, exception) -> None:
        if trainer.world_size == 1 or isinstance(exception, Stopped | KeyboardInterrupt):
            return
        where = f"rank {trainer.global_rank} failed in step {trainer.global_step + 1:,}"
        if isinstance(exception, Failure | CheckpointError | OSError):
            text = f": {shown(reason(exception))}"
        else:
            text = "\n" + "".join(traceback.format_exception(exception))
        print(f"{where}{text}", file=sys.stderr, flush=True)
        if isinstance(exception, BadSteps):  # all ranks have it, and can finish what they save
            trainer.strategy.checkpoint_io.wait()
        ending = threading.Timer(TIDY_SECONDS, os._exit, [1])
        ending.daemon = True
        ending.start()


def follow_launcher() -> None:
    """End a process that Lightning's launcher started TIDY_SECONDS after the launcher has ended.
    The launcher watches the other processes, but nothing watches the launcher; with NCCL they would
    wait for it in a kernel. Only for work in which all processes wait for each other."""
    if "LOCAL_RANK" not in os.environ:  # this is the launcher: its processes find its number here
        os.environ[LAUNCHER] = str(os.getpid())
        return
    launcher = int(os.environ.get(LAUNCHER, 0))
    if not launcher or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    if launcher == os.getppid() or process_start(launcher) is None:
        threading.Thread(target=_follow, args=(launcher,), daemon=True).start()


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    time.sleep(TIDY_SECONDS)  # if the run is over, this process ends by itself
    print(f"the first process ({launcher}) is gone: ending", file=sys.stderr, flush=True)
    os._exit(1)


class StallWatch(L.Callback):
    """Says when training has waited long for its next batch; it goes on waiting."""

    def __init__(self, seconds: float = STALL_SECONDS):
        self.seconds = seconds
        self._since: float | None = None  # waiting since
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer, pl_module) -> None:
        self._done.clear()
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._watch, args=(trainer,), daemon=True)
        self._thread.start()

    def _begin(self, *hook) -> None:
        self._since = time.monotonic()

    def _pause(self, *hook) -> None:
        self._since = None

    def _end(self, *hook) -> None:
        self._done.set()

    on_train_batch_end = on_validation_end = _begin
    on_train_batch_start = on_validation_start = _pause
    on_train_end = on_exception = _end

    def _watch(self, trainer) -> None:
        said = 0
        while not self._done.wait(min(self.seconds / 4, 5.0)):
            since = self._since
            waited = 0.0 if since is None else time.monotonic() - since
            said = said if waited >= self.seconds else 0
            if waited >= self.seconds * (said + 1):
                said += 1
                print(
                    f"rank {trainer.global_rank}, step {trainer.global_step + 1:,}: no batch from"
                    f" the {trainer.datamodule.num_workers} data workers for {waited:.0f} s;"
                    " data.cache_dir may lie on a slow disk, or a worker hangs",
                    file=sys.stderr,
                    flush=True,
                )
