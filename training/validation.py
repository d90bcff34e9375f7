"""One validation of a Diffusion: its likelihood, and the search for the training interval, or for
the counts to train on."""

from dataclasses import replace
from functools import partial

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from evaluation.estimators import AskedTexts, Chance, drawn_counts
from evaluation.likelihood import Likelihood, LikelihoodMeter
from noise_schedule import LogLinear
from objectives import clipping
from objectives.corruption import EXACT, Interval, Noise
from objectives.counts import CountLaw, SecondMoments, least_variance, within
from objectives.loss import LossInputs, Objective, TokenLoss
from random_streams import key

SHARES = 4  # parts of the masked shares of a block, whose losses are logged apart


class Validation:
    """`search` is None unless the schedule is clipped and the run trains: then the candidates for
    the interval to train on, or for the range of counts, are compared. `second` is None unless the
    law of the counts is learnt and the run trains. `shares` float64 [2, SHARES] is None where times
    are drawn: sums over blocks of the nats of their masked tokens, and of how many these are."""

    def __init__(self, module: L.LightningModule):
        self.module, self.meter = module, LikelihoodMeter()
        self.timed = by_time(module, module.validate_by)
        self.shares: Tensor | None = None
        if not self.timed:
            self.shares = torch.zeros(2, SHARES, dtype=torch.float64, device=module.device)
        self.search: clipping.Search | None = None
        self.second: SecondMoments | None = None
        trainer = module.trainer
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if module.noise_settings.learn_counts:
            self.second = SecondMoments(len(module.count_law.density), module.device)
        if module.clip is not None and module.objective.sizes is None:
            self._begin_search(module.clip)

    def _begin_search(self, clip) -> None:
        module, widths = self.module, list(clip.widths)
        size, eps = module.objective.block_size, module.noise_settings.sampling_eps
        counted = module.count_law is not None
        if counted:
            grid = clipping.count_candidates(size, widths, clip.delta)
        else:
            grid = clipping.candidates(size, widths, clip.delta, eps)
        if len(grid) == 1:  # there is nothing to choose
            return
        self.search = clipping.Search(grid)
        trainer = module.trainer
        self.batches = clipping.Batches(trainer.datamodule.eval_batch_size * trainer.world_size)
        if counted:
            laws = [within(*counts, size) for counts in grid]
            self.variances = partial(clipping.law_variances, laws)
        elif not self.timed:
            moments = clipping.moments(module.objective, grid).to(module.device)
            self.variances = partial(clipping.variances, moments)

    def add(self, batch: dict) -> None:
        module = self.module
        loss = one_pass(module, batch, module.validate_by)
        self.meter.update(loss.nll, loss.loss_mask)
        counts = () if self.timed else self._counts(batch)
        if self.search is not None and self.search.wants_more():
            rows = (self._by_times if self.timed else self._by_counts)(batch, loss, *counts)
            self._compare(self.batches.add(self._of_all(rows)))
        if not self.timed:
            sums = loss.block_means(module.objective.block_size) * module.objective.block_size
            self._add_shares(sums, *counts)
            if self.second is not None:
                self.second.add(sums, *counts)

    def _add_shares(self, losses: Tensor, m: Tensor, n: Tensor) -> None:
        """Losses of blocks with m of n scored tokens masked, weighed by n / m: [B, N] each."""
        part = (-(-SHARES * m // n.clamp(min=1)) - 1).clamp(min=0).flatten()
        nats = losses.double() * m / n.clamp(min=1)
        self.shares.index_add_(1, part, torch.stack([nats, m.double()]).flatten(1))

    def _by_times(self, batch: dict, loss: TokenLoss) -> Tensor:
        """The mean loss of each block at each candidate, [B, N, C], as published: a pass for each,
        but for that of `loss`."""
        module, found = self.module, []
        real, noise = batch["attention_mask"].to(module.device), nelbo_noise(module, batch)
        for interval in self.search.grid:
            drawn = loss
            if interval != reported_interval(module):
                drawn = module.compute_loss(
                    module.loss_inputs(batch, interval, noise, training=False)
                )
            found.append(drawn.block_means(module.objective.block_size, real))
        return torch.stack(found, -1)

    def _by_counts(self, batch: dict, loss: TokenLoss, m: Tensor, n: Tensor) -> Tensor:
        """The mean loss of each block, and m and n, [B, N, 3]: enough for all candidates."""
        real = batch["attention_mask"].to(self.module.device)
        means = loss.block_means(self.module.objective.block_size, real).double()
        return torch.stack([means, m.double(), n.double()], -1)

    def _compare(self, batches: list[Tensor]) -> None:
        """The variance of each candidate in these global batches."""
        for batch in batches:
            if self.timed:
                self.search.add([clipping.variance(means) for means in batch.unbind(-1)])
            else:
                means, m, n = batch.flatten(0, 1).unbind(-1)
                # the loss weighs what is masked with n / m
                self.search.add(list(self.variances(means * m / n.clamp(min=1), m, n)))

    def _counts(self, batch: dict) -> tuple[Tensor, Tensor]:
        """How many tokens of each block `loss` masks, and of how many: int64 [B, N] each."""
        module, (texts, _) = self.module, texts_of(self.module, batch)
        masked, _ = drawn_counts(texts, chance(module, batch))
        counts = texts.per_block(masked).sum(-1), texts.counts[..., 0]
        return tuple(count.to(module.device) for count in counts)

    def likelihood(self) -> Likelihood:
        """What was measured so far, over all devices; every rank must call it."""
        sums = self.meter.sums
        if sums is None:  # this device had no row
            sums = torch.zeros(6, dtype=torch.float64)
        found = self.meter.compute(self._over_devices(sums))
        if self.shares is None:
            return found
        shares = self._over_devices(self.shares).T.tolist()
        return replace(found, by_share=tuple(s / m if m else None for s, m in shares))

    def _over_devices(self, sums: Tensor) -> Tensor:
        module = self.module
        if module.trainer.world_size == 1:
            return sums
        return module.all_gather(sums.to(module.device)).sum(0)

    def adopt(self) -> dict[str, float]:
        """Train on the best interval or law from here on. What is logged of it: every candidate's
        variance, or how likely each part of the law is."""
        if self.second is not None:
            return self._adopt_law()
        if self.search is None:
            return {}
        if self.search.wants_more():
            self._compare(self.batches.rest())
        module, search, size = self.module, self.search, self.module.objective.block_size
        counted = module.count_law is not None
        name = clipping.name_of_counts if counted else clipping.name
        found = {name(each): mean for each, mean in zip(search.grid, search.means(), strict=True)}
        if not module.clip.fix and counted:
            set_law(module, within(*search.best(), size))
        elif not module.clip.fix:
            set_interval(module, search.best())
        low, high = module.interval
        if counted:
            return {**found, "counts_min": round(low * size) + 1, "counts_max": round(high * size)}
        return {**found, "sampling_eps_min": low, "sampling_eps_max": high}

    def _adopt_law(self) -> dict[str, float]:
        module = self.module
        set_law(module, least_variance(self._over_devices(self.second.sums)))
        density = module.count_law.density
        return {f"count_law_{i}": float(x) / len(density) for i, x in enumerate(density, 1)}

    def _of_all(self, rows: Tensor) -> Tensor:
        """The rows [B, ...] of all devices; the last batches of a split differ in B."""
        if self.module.trainer.world_size == 1:
            return rows
        gather = self.module.all_gather
        counts = gather(torch.tensor(len(rows), device=rows.device))
        padded = rows.new_zeros(int(counts.max()), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = zip(gather(padded), counts.tolist(), strict=True)
        return torch.cat([part[:count] for part, count in gathered])


def set_interval(module: L.LightningModule, interval: Interval) -> None:
    """The times that training draws, also in the buffers that checkpoints keep."""
    module.interval = interval
    module.sampling_eps_min.fill_(interval[0])
    module.sampling_eps_max.fill_(interval[1])


def set_law(module: L.LightningModule, law: CountLaw) -> None:
    """The law by which training draws counts; the buffers, where there are any, keep its ends."""
    module.count_law = law
    if module.clip is not None:
        set_interval(module, law.ends)


# ---- the draws of a validation: of a Diffusion, for a batch on the host --------------------------


def by_time(module: L.LightningModule, likelihood: str) -> bool:
    """Whether a likelihood is measured at drawn times; else at drawn numbers of masked tokens."""
    return likelihood != "counts" or module.exact_nll or not module.objective.draws_noise


def one_pass(module: L.LightningModule, batch: dict, likelihood: str, draw: int = 0) -> TokenLoss:
    """A draw of `nelbo` or `counts`, by one pass over both halves. With blocks of one token either
    is the likelihood itself."""
    if not by_time(module, likelihood):
        texts, loss_mask = texts_of(module, batch)
        masked, weight = drawn_counts(texts, chance(module, batch, draw))
        x_t = torch.where(masked, texts.mask_id, texts.x0)
        inputs = module.objective.weighted_inputs(
            texts.x0, x_t, weight.float(), loss_mask, module.documents(batch)[2]
        )
    else:
        inputs = inputs_by_time(module, batch, draw)
    return module.compute_loss(inputs)


def reported_interval(module: L.LightningModule) -> Interval:
    return EXACT if module.exact_nll else (module.noise_settings.sampling_eps, 1.0)


def even_in_p(objective: Objective, eps: float) -> Objective:
    """The objective for a bound on the likelihood over times from eps on. A schedule that masks
    much more than eps at eps (square_root: 3.1 %) would leave that share out. The bound does not
    depend on the schedule, so LogLinear, in which p is uniform, takes the place of such a one."""
    if not objective.draws_noise or float(objective.schedule(torch.tensor(eps)).p) <= 1.01 * eps:
        return objective
    return replace(objective, schedule=LogLinear())


def nelbo_noise(module: L.LightningModule, batch: dict, draw: int = 0) -> Noise | None:
    seed = chance(module, batch, draw).seed
    return module.noise(batch, seed, module.noise_settings.eval_global_batch)


def inputs_by_time(module: L.LightningModule, batch: dict, draw: int = 0) -> LossInputs:
    """What a draw of `nelbo` is computed from."""
    x0, valid, document_ids = module.documents(batch)
    objective = even_in_p(module.objective, module.noise_settings.sampling_eps)
    return objective.loss_inputs(
        x0,
        valid,
        nelbo_noise(module, batch, draw),
        interval=reported_interval(module),
        training=False,
        document_ids=document_ids,
    )


def weights_by_time(module: L.LightningModule, batch: dict, draw: int) -> Tensor:
    """Of the nll of each token that a draw of `nelbo` masks, 0 elsewhere: [B, L]."""
    inputs = inputs_by_time(module, batch, draw)
    weights = inputs.weights.new_zeros(inputs.loss_mask.numel())
    weights.index_copy_(0, inputs.predicted, inputs.weights)
    return weights.view_as(inputs.loss_mask)


def texts_of(module: L.LightningModule, batch: dict) -> tuple[AskedTexts, Tensor]:
    """The batch as the estimators take it, and its loss mask float32 [B, L]."""
    x0, valid, document_ids = module.documents(batch)
    objective = module.objective
    loss_mask = objective.loss_mask(valid, False, document_ids)
    return AskedTexts(x0, loss_mask > 0, objective.block_size, objective.mask_id), loss_mask


def chance(module: L.LightningModule, batch: dict, draw: int = 0) -> Chance:
    """The random numbers of sampled likelihoods; `nelbo` takes the seed alone."""
    settings = module.noise_settings
    seed = key(settings.seed, "evaluate", draw)
    return Chance(seed, batch["row"], module.validation_rows or settings.eval_global_batch)
