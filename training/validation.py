"""One validation of a Diffusion: its likelihood, and the search for the training interval."""

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from evaluation.likelihood import Likelihood, LikelihoodMeter
from objectives import clipping
from objectives.corruption import EXACT, Interval, Noise
from objectives.loss import TokenLoss


class Validation:
    """`search` is None unless this validation chooses the interval to train on."""

    def __init__(self, module: L.LightningModule):
        self.module, self.meter = module, LikelihoodMeter()
        self.search: clipping.Search | None = None

    def begin_search(self) -> None:
        """Where the schedule is clipped and the run trains, compare the candidates."""
        module, clip = self.module, self.module.clip
        trainer = module.trainer
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if clip is not None and fitting:
            grid = clipping.candidates(
                module.objective.block_size,
                list(clip.widths),
                clip.delta,
                module.noise_settings.sampling_eps,
            )
            if len(grid) > 1:  # with the full interval alone there is nothing to choose
                self.search = clipping.Search(grid)

    def add(self, batch: dict, noise: Noise | None) -> None:
        module = self.module
        full = (module.noise_settings.sampling_eps, 1.0)
        reported = EXACT if module.exact_nll else full
        loss = module.token_loss(batch, reported, noise, training=False)
        self.meter.update(loss.nll, loss.loss_mask)
        if self.search is not None and self.search.wants_more():
            real = batch["attention_mask"].to(module.device)
            found = {reported: self._variance(loss, real)}
            for interval in self.search.grid:
                if interval not in found:
                    other = module.token_loss(batch, interval, noise, training=False)
                    found[interval] = self._variance(other, real)
            self.search.add([found[interval] for interval in self.search.grid])

    def likelihood(self) -> Likelihood:
        """What was measured so far, over all devices; every rank must call it."""
        sums = self.meter.sums
        if self.module.trainer.world_size > 1:
            mine = torch.zeros(6, dtype=torch.float64) if sums is None else sums
            sums = self.module.all_gather(mine.to(self.module.device)).sum(0)
        return self.meter.compute(sums)

    def adopt(self) -> None:
        """Log every candidate's variance and train on the best interval from here on."""
        if self.search is None:
            return
        module, grid, means = self.module, self.search.grid, self.search.means()
        module.log_dict({clipping.name(i): mean for i, mean in zip(grid, means, strict=True)})
        if not module.clip.fix:
            set_interval(module, self.search.best())
        low, high = module.interval
        module.log_dict({"sampling_eps_min": low, "sampling_eps_max": high})

    def _variance(self, loss: TokenLoss, real: Tensor) -> Tensor:
        means = loss.block_means(self.module.objective.block_size, real)
        several = self.module.trainer.world_size > 1
        return clipping.variance(self._of_all(means) if several else means)

    def _of_all(self, rows: Tensor) -> Tensor:
        """The rows [B, N] of all devices; the last batches of a split differ in B."""
        gather = self.module.all_gather
        counts = gather(torch.tensor(len(rows), device=rows.device))
        padded = rows.new_zeros(int(counts.max()), rows.shape[1])
        padded[: len(rows)] = rows
        gathered = zip(gather(padded), counts.tolist(), strict=True)
        return torch.cat([part[:count] for part, count in gathered])


def set_interval(module: L.LightningModule, interval: Interval) -> None:
    """The times that training draws, also in the buffers that checkpoints keep."""
    module.interval = interval
    module.sampling_eps_min.fill_(interval[0])
    module.sampling_eps_max.fill_(interval[1])
