"""The Lightning module of all four algorithms: one step, metrics, optimizer, checkpoint contents.
No maths.

What a loss is belongs to objectives/, the average of the weights to models/ema.py, the order of the
data to the data module. A batch is {"input_ids" [B, L], "attention_mask" [B, L], "row" [B]}, and
"document_ids" [B, L] where a row holds several documents (packing.document_ids): row is the index
of the example in the endless stream of training data, or in the validation split, and with the seed
it fixes the noise of that example.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

import random_streams
from evaluation.likelihood import Likelihood
from models.ema import EMA
from objectives.corruption import Interval, Noise, draw_example_noise
from objectives.counts import CountLaw
from objectives.graphs import GraphedLoss
from objectives.loss import LossInputs, Objective, TokenLoss
from objectives.sizes import SizeLaw, size_at
from training import averaging, distributed
from training.csv_log import record
from training.health import StepHealth
from training.logged import figures
from training.optimizers import Masters, OptimizerSettings, build_optimizer, exchange, trained
from training.state import load_state, save_state
from training.validation import Validation


@dataclass(frozen=True)
class NoiseSettings:
    """Which times are drawn, and how. The full interval is (sampling_eps, 1).

    `counts`: the law that training begins with where numbers of masked tokens are drawn in place of
    times; the interval is then that of their shares. `learn_counts`: each validation finds the law
    anew. `views`: 2 for two complementary noised versions of each row. `block_schedule`: the size
    of blocks by the step from which it is trained; without one it is the objective's.
    """

    seed: int
    interval: Interval
    sampling_eps: float
    antithetic: bool
    global_batch: int
    eval_global_batch: int
    counts: CountLaw | None = None
    learn_counts: bool = False
    views: int = 1
    block_schedule: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ClippingSettings:
    """The search for the training interval, or range of counts, with the least variance; `fix`:
    search and log only."""

    widths: tuple[float, ...]
    delta: float
    fix: bool


class Diffusion(L.LightningModule):
    """`clip` is None for algorithms without a clipped schedule: those have no sampling_eps buffers
    either. `lr_factor`: step -> factor on the optimizer's learning rate.

    `exact_nll`: validate at the interval (1, 1), which for blocks of one token is the exact
    likelihood; else `validate_by` says by which draw, nelbo or counts. `pad_apart`: rows may end in
    padding, which nobody attends to. `description`: plain containers kept in checkpoints.
    `pin_memory`: what is sent to a device lies in pinned memory.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        objective: Objective,
        noise: NoiseSettings,
        optimizer: OptimizerSettings,
        lr_factor: Callable[[int], float],
        ema_decay: float,
        clip: ClippingSettings | None = None,
        exact_nll: bool = False,
        validate_by: str = "nelbo",
        pad_apart: bool = False,
        pin_memory: bool = True,
        health: StepHealth | None = None,
        description: dict | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.objective = objective
        self.noise_settings = noise
        self.optimizer_settings, self.lr_factor = optimizer, lr_factor
        self.clip = clip
        self.exact_nll, self.validate_by = exact_nll, validate_by
        self.pad_apart, self.pin_memory = pad_apart, pin_memory
        self.health = health or StepHealth()
        self.description = description or {}
        self.count_law = noise.counts
        self.interval = noise.interval if noise.counts is None else noise.counts.ends
        if clip is not None:
            self.register_buffer("sampling_eps_min", torch.tensor(float(self.interval[0])))
            self.register_buffer("sampling_eps_max", torch.tensor(float(self.interval[1])))
        self.ema = EMA(trained(backbone), ema_decay) if ema_decay else None
        self.averaged = False  # whether the EMA weights are in place of the raw ones
        self.validation_rows: int | None = None  # how many there are, where that is known
        self.validation: Validation | None = None
        self.graphed: GraphedLoss | None = None
        self.validated: Likelihood | None = None  # the result of the last validation
        self.validated_at = 0  # and its step

    def configure_model(self) -> None:
        distributed.share_out(self)
        training = self.trainer.state.fn == TrainerFn.FITTING
        if training and self.optimizer_settings.masters and self.backbone.masters is None:
            self.backbone.masters = Masters(self.backbone)

    def compute_loss(self, inputs: LossInputs) -> TokenLoss:
        return self.objective.compute_loss(self.backbone, inputs.to(self.device, self.pin_memory))

    def loss_inputs(
        self, batch: dict, interval: Interval, noise: Noise | None, training: bool
    ) -> LossInputs:
        """What the loss is computed from, made on the host; noise is None where none is drawn."""
        x0, mask, document_ids = self.documents(batch)
        objective = self.training_objective(batch) if training else self.objective
        return objective.loss_inputs(
            x0, mask, noise, interval=interval, training=training, document_ids=document_ids
        )

    def documents(self, batch: dict) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, 1 where a token may be predicted, and which document it belongs to: each [B, L]."""
        x0, mask = batch["input_ids"], batch["attention_mask"]
        # padding forms a document of its own, so it is neither attended to nor attends
        document_ids = mask.long() if self.pad_apart else batch.get("document_ids")
        # the text itself may hold mask tokens (tokenizers read the letters "[MASK]" as one), whose
        # probability is 0: they are seen, not predicted
        return x0, mask * (x0 != self.objective.mask_id), document_ids

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        seed = self.noise_settings.seed
        random_streams.seed_dropout(seed, int(batch["row"][0]), self.device)
        objective = self.training_objective(batch)
        size = objective.noise_block(batch["input_ids"].shape[1])
        drawn = self.noise_settings.global_batch, objective.sizes, size
        inputs = self.training_inputs(batch, self.noise(batch, seed, *drawn))
        parts = self.training_loss(inputs)
        self.health.saw(batch, parts, inputs.loss_mask, inputs.masked)
        return parts.flatten()[0]

    def training_objective(self, batch: dict) -> Objective:
        """That of the step which these rows belong to: the blocks of training may grow."""
        schedule = self.noise_settings.block_schedule
        if not schedule:
            return self.objective
        step = int(batch["row"][0]) // self.noise_settings.global_batch
        return replace(self.objective, block_size=size_at(schedule, step))

    def training_inputs(self, batch: dict, noise: Noise | None) -> LossInputs:
        objective = self.training_objective(batch)
        x0, mask, document_ids = self.documents(batch)
        given = {"document_ids": document_ids}
        if self.count_law is None:
            inputs = self.loss_inputs(batch, self.interval, noise, training=True)
        elif self.noise_settings.views > 1:
            inputs = objective.inputs_by_views(x0, mask, noise, **given)
        else:
            inputs = objective.inputs_by_counts(x0, mask, noise, law=self.count_law, **given)
        if objective.ar_loss:
            inputs = objective.with_ar_loss(inputs, x0, document_ids)
        return inputs

    def training_loss(self, inputs: LossInputs) -> Tensor:
        """Of a micro-batch: nats per token, counted or not (TokenLoss.parts)."""
        if self.graphed is not None:
            return self.graphed(inputs)
        return self.compute_loss(inputs).parts

    def noise(
        self,
        batch: dict,
        seed: int,
        global_batch: int,
        sizes: SizeLaw | None = None,
        block_size: int | None = None,
    ) -> Noise | None:
        """The noise of these examples: a function of the seed and their place in the stream. sizes:
        by which rows draw the size of their blocks. block_size: None for the objective's."""
        if not self.objective.draws_noise:
            return None
        x0 = batch["input_ids"]
        return draw_example_noise(
            seed,
            batch["row"],
            global_batch=global_batch,
            length=x0.shape[1],
            block_size=block_size or self.objective.noise_block(x0.shape[1]),
            antithetic=self.noise_settings.antithetic,
            sizes=sizes,
        )

    def transfer_batch_to_device(self, batch: dict, device: torch.device, index: int) -> dict:
        """Nothing yet: the host makes the loss inputs first, and need not wait for the device."""
        return batch

    def on_validation_epoch_start(self) -> None:
        averaging.put_average(self, True)
        self.validation = Validation(self)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.validation.add(batch)

    def running_likelihood(self) -> Likelihood:
        """For the progress bar: the likelihood of this process's rows so far."""
        return self.validation.meter.compute()

    def on_validation_epoch_end(self) -> None:
        averaging.put_average(self, False)
        if not self.trainer.sanity_checking:
            self.validated_at = self.trainer.global_step
        # now: when validation has ended, the module may be on another device than the group's
        self.validated = result = self.validation.likelihood()
        found = {**figures(result), **self.validation.adopt()}
        self.log_dict(found, logger=False)  # for best.ckpt; Lightning's steps begin at 0
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            record(self.trainer, found)

    def configure_optimizers(self):
        if self.backbone.masters is not None:
            self.backbone.masters.to(self.device)
        optimizer = build_optimizer(self.backbone, self.optimizer_settings, self.fused())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "name": "trainer/lr"}]

    def fused(self) -> bool:
        """One pass over the weights; not where float16 must unscale gradients before clipping."""
        return self.trainer.precision != "16-mixed"

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        averaging.update(self)

    def on_after_backward(self) -> None:
        if self.backbone.masters is not None:
            self.backbone.masters.collect()

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Make the gradient that of the global batch's mean and clip it, or where loss or gradient
        are not finite leave the step out."""
        named = [(name, p) for name, p in trained(self.backbone) if p.grad is not None]
        averaging.uncount(self, self.health.inspect(self.trainer, named))
        self.trainer.optimizers[0].found_inf = self.health.found  # AdamW reads it if fused
        if not self.health.skipped:
            self.health.scale(named, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        if self.ema is not None:
            self.ema.to(self.device)
        if self.backbone.masters is not None and self.trainer.world_size > 1:
            self.trainer.model.register_comm_hook(self.backbone.masters, exchange)
        reads_found = self.fused() and self.optimizer_settings.momentum is None  # Muon does not
        self.health.late = reads_found and self.device.type != "cpu"
        self.graphed = None
        # the gradients of a graph come all at once at its end. Between hosts their exchange takes
        # long, and goes on during a backward pass that is not a graph
        one_host = self.trainer.num_nodes == 1
        # layers that are made again draw their dropout again from a state that a graph cannot read
        once = not self.backbone.recompute
        # shared out weights come and go during a pass, and a graph reads them where they were
        stays = not distributed.has_sharded_weights(self.backbone)
        compiled = self.backbone.compiled and self.device.type == "cuda"
        if compiled and one_host and once and stays:
            self.graphed = GraphedLoss(
                self.backbone,
                lambda *asked: self.objective.compute_loss(*asked).parts,
                lambda inputs: inputs.to(self.device, self.pin_memory),
                shared=self.trainer.accumulate_grad_batches > 1,
            )

    def on_train_end(self) -> None:
        averaging.settle(self)
        self.graphed = None

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        save_state(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        load_state(self, checkpoint)
