"""The validation rows by the likelihoods that are asked for: what mode=ppl_eval runs."""

import dataclasses
import itertools
import time
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn

from diffusion import Diffusion
from evaluation.estimators import Ask, AskedTexts
from evaluation.journal import Journal
from evaluation.likelihood import Likelihood, RowResults
from evaluation.network import asker
from evaluation.table import Chosen, one
from models.compiling import keep_signal
from objectives.block_diffusion import MaskedDiffusion
from training.validation import chance, one_pass, texts_of, weights_by_time
from utils import say


@dataclass(frozen=True)
class Measure:
    """A likelihood at a block size."""

    size: int
    chosen: Chosen

    def passes(self, draws: int) -> int:
        return self.chosen.passes(self.size, draws)


class Evaluator(L.LightningModule):
    """Every batch by every measure that its rows do not have yet. modules: the network at each
    block size. In the end `found` has of each measure its result and the seconds it took,
    `measured` the rows of all processes, and `rows` their numbers."""

    def __init__(self, modules: dict[int, Diffusion], journals: dict[Measure, Journal], draws: int):
        super().__init__()
        self.at = nn.ModuleDict({str(size): module for size, module in modules.items()})
        self.journals = journals
        self.draws = {each: draws if each.chosen.kind.sampled else 1 for each in journals}
        self.results = {each: RowResults(each.chosen.kind.sampled) for each in journals}
        self.seen: list[int] = []  # rows of this run
        self.rows: set[int] = set()
        self.measured: dict[Measure, RowResults] = {}
        self.found: dict[Measure, tuple[Likelihood, float]] = {}

    def of(self, each: Measure) -> Diffusion:
        return self.at[str(each.size)]

    @property
    def at_once(self) -> bool:
        """Whether one pass over both halves gives everything that is asked for."""
        chosen = list(self.journals)
        if len(self.at) > 1:
            return False
        module = self.of(chosen[0])
        if not isinstance(module.objective, MaskedDiffusion) or module.exact_nll:
            return True
        # a draw of one of the two; exact takes one pass of blocks of one token, but is no draw
        single = [each.chosen.kind.passes is one and self.draws[each] == 1 for each in chosen]
        return single == [True]

    def running_likelihood(self) -> Likelihood | None:
        """For the progress bar: that of the first kind, of this process's rows so far."""
        first = next(iter(self.results.values()))
        rows = [row for row in self.seen if row in first.rows]
        return first.likelihood(rows) if rows else None

    def on_validation_start(self) -> None:
        for each, journal in self.journals.items():
            journal.read(self.results[each])
            if done := len(self.results[each].rows):
                say(f"{self.name(each)}: {done:,} rows were measured before")

    def name(self, each: Measure) -> str:
        size = f" at block_size={each.size}" if len(self.at) > 1 else ""
        return f"eval.likelihood={each.chosen.label}{size}"

    def transfer_batch_to_device(self, batch: dict, device: torch.device, index: int) -> dict:
        return batch

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        keep_signal()
        rows, asks, done = batch["row"].tolist(), {}, itertools.count(1)
        self.seen += rows
        for each, results in self.results.items():
            places = tuple(i for i, row in enumerate(rows) if row not in results.rows)
            if not places:
                continue
            started = time.monotonic()
            part = {name: value[list(places)] for name, value in batch.items()}
            key = each.size, places
            if not self.at_once and key not in asks:
                # the keys and values of another size are not needed any more
                asks = {key: ask for key, ask in asks.items() if key[0] == each.size}
                asks[key] = self._ask(part, each, batch_idx, done)
            nll, tokens = self._measure(part, each, asks.get(key))
            measured = [rows[i] for i in places], tokens.tolist(), nll.tolist()
            seconds = time.monotonic() - started
            results.add(*measured)
            results.seconds += seconds
            self.journals[each].write(*measured, seconds)

    def _measure(self, batch: dict, each: Measure, given) -> tuple[Tensor, Tensor]:
        """nll [B, K] of each draw, and the number of tokens [B]."""
        draws = range(self.draws[each])
        if self.at_once:
            losses = [one_pass(self.of(each), batch, each.chosen.name, draw) for draw in draws]
            nll = [loss.nll.double().sum(1) for loss in losses]
            return torch.stack(nll, 1), losses[0].loss_mask.sum(1).long()
        texts, ask = given
        nll = [self._draw(batch, each, texts, ask, draw).sum(1) for draw in draws]
        return torch.stack(nll, 1), texts.scored.sum(1)

    def _ask(self, batch: dict, each: Measure, index: int, done) -> tuple[AskedTexts, Ask]:
        """Every pass is told to the progress bar: of exact and the like a batch has many. done:
        counts them."""
        module = self.of(each)
        texts, _ = texts_of(module, batch)
        x0, scored = texts.x0.to(self.device), texts.scored.to(self.device)
        ids = module.documents(batch)[2]
        ask = asker(
            module.backbone,
            x0,
            block_size=texts.block_size,
            mask_id=texts.mask_id,
            document_ids=None if ids is None else ids.to(self.device),
            adapt=module.objective.adapt,
        )
        asked = dataclasses.replace(texts, x0=x0, scored=scored)
        bar = self.trainer.progress_bar_callback
        passes = sum(each.passes(draws) for each, draws in self.draws.items())

        def counted(*question):
            answer = ask(*question)
            if bar is not None:
                part = min(1, next(done) / passes)  # a batch of which some is there has fewer
                bar.on_validation_part(self.trainer, self, index + part)
            return answer

        return asked, counted

    def _draw(self, batch: dict, each: Measure, texts: AskedTexts, ask: Ask, draw: int) -> Tensor:
        """Nats per token, [B, L]."""
        module, chosen = self.of(each), each.chosen
        if chosen.name != "nelbo":
            return chosen.estimate(ask, texts, chance(module, batch, draw))
        weight = weights_by_time(module, batch, draw).to(self.device)
        return weight * texts.surprisal(ask, weight > 0)

    def on_validation_epoch_end(self) -> None:
        mine = self.seen, self.results
        of_all = [mine]
        if self.trainer.world_size > 1:
            of_all = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(of_all, mine)
        self.rows = {row for seen, _ in of_all for row in seen}
        for each in self.results:
            parts = [results[each] for _, results in of_all]
            joined = RowResults(each.chosen.kind.sampled)
            for part in parts:
                joined.rows |= part.rows
            seconds = max(part.seconds for part in parts)
            self.measured[each] = joined
            self.found[each] = joined.likelihood(self.rows), seconds
