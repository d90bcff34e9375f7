"""mode=ppl_eval: measure the perplexity of a checkpoint on the validation split."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

import settings
from checkpointing.as_trained import streams_version
from checkpointing.layouts import Checkpoint
from checkpointing.load import say_untrained, trained_sizes
from diffusion import Diffusion
from evaluation.estimators import Ask, AskedTexts
from evaluation.journal import Journal
from evaluation.likelihood import Likelihood, RowResults
from evaluation.network import asker
from evaluation.table import BOUND, Chosen, check_likelihoods, one, parse_likelihood
from modes.build import build_data, build_tokenizer, trained_module
from objectives.algorithms import get_algorithm
from objectives.block_diffusion import MaskedDiffusion
from settings import Config
from training.flops import matmul_dtype
from training.trainer import build_trainer
from training.validation import chance, one_pass, texts_of, weights_by_time
from utils import rank, say, write_json


def prepare(config: Config) -> Callable[[], None]:
    L.seed_everything(config.seed, workers=True, verbose=False)
    wanted = [parse_likelihood(label) for label in config.eval.likelihood]
    writes = get_algorithm(config.algo.name).writes
    size = config.model.length if writes == "mdlm" else config.block_size
    limits = {"algo": writes, "draws": config.eval.draws, "most": config.eval.max_passes}
    check_likelihoods(wanted, block_size=size, **limits)
    tokenizer = build_tokenizer(config)
    module, checkpoint = trained_module(config, tokenizer)
    say_untrained(trained_sizes(checkpoint, config.algo.name), [config.block_size])
    data = build_data(config, tokenizer, train=False)
    module.validation_rows = len(data.valid)
    place = result_path(config, checkpoint, wanted)
    facts = journal_facts(config, checkpoint, data.valid.about)
    journals = {
        each: Journal(place.with_suffix(".rows"), {"likelihood": each.label, **facts}, rank())
        for each in wanted
    }
    evaluator = Evaluator(module, journals, config.eval.draws)
    precision = config.trainer.precision
    if not evaluator.at_once and precision.endswith("-mixed"):
        module.backbone.freeze(matmul_dtype(precision))
    trainer = build_trainer(config, loggers=[])

    def run() -> None:
        rows = f"{len(data.valid):,} rows of {config.model.length:,} tokens"
        for each in wanted:
            passes = 1 if evaluator.at_once else each.passes(size, config.eval.draws)
            word = "pass" if passes == 1 else "passes"
            say(f"eval.likelihood={each.label}: {passes:,} {word} over {rows}")
        trainer.validate(evaluator, datamodule=data, verbose=False)
        report(config, evaluator.found, place)
        for journal in journals.values() if rank() == 0 else ():
            journal.remove()

    return run


class Evaluator(L.LightningModule):
    """Every batch by every likelihood that its rows do not have yet. `found` in the end: of each
    likelihood its result and the seconds it took."""

    def __init__(self, module: Diffusion, journals: dict[Chosen, Journal], draws: int):
        super().__init__()
        self.module, self.journals = module, journals
        self.draws = {each: draws if each.kind.sampled else 1 for each in journals}
        self.results = {each: RowResults(each.kind.sampled) for each in journals}
        self.seen: list[int] = []  # rows of this run
        self.found: dict[Chosen, tuple[Likelihood, float]] = {}

    @property
    def at_once(self) -> bool:
        """Whether one pass over both halves gives everything that is asked for."""
        objective, chosen = self.module.objective, list(self.journals)
        if not isinstance(objective, MaskedDiffusion) or self.module.exact_nll:
            return True
        # a draw of one of the two; exact takes one pass of blocks of one token, but is no draw
        single = [each.kind.passes is one and self.draws[each] == 1 for each in chosen]
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
                say(f"eval.likelihood={each.label}: {done:,} rows were measured before")

    def transfer_batch_to_device(self, batch: dict, device: torch.device, index: int) -> dict:
        return batch

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        rows, asks = batch["row"].tolist(), {}
        self.seen += rows
        for each, results in self.results.items():
            places = tuple(i for i, row in enumerate(rows) if row not in results.rows)
            if not places:
                continue
            started = time.monotonic()
            part = {name: value[list(places)] for name, value in batch.items()}
            if not self.at_once and places not in asks:
                asks[places] = self._ask(part, batch_idx)
            nll, tokens = self._measure(part, each, asks.get(places))
            measured = [rows[i] for i in places], tokens.tolist(), nll.tolist()
            seconds = time.monotonic() - started
            results.add(*measured)
            results.seconds += seconds
            self.journals[each].write(*measured, seconds)

    def _measure(self, batch: dict, each: Chosen, given) -> tuple[Tensor, Tensor]:
        """nll [B, K] of each draw, and the number of tokens [B]."""
        draws = range(self.draws[each])
        if self.at_once:
            losses = [one_pass(self.module, batch, each.name, draw) for draw in draws]
            nll = [loss.nll.double().sum(1) for loss in losses]
            return torch.stack(nll, 1), losses[0].loss_mask.sum(1).long()
        texts, ask = given
        nll = [self._draw(batch, each, texts, ask, draw).sum(1) for draw in draws]
        return torch.stack(nll, 1), texts.scored.sum(1)

    def _ask(self, batch: dict, index: int) -> tuple[AskedTexts, Ask]:
        """Every pass is told to the progress bar: of exact and the like a batch has many."""
        texts, _ = texts_of(self.module, batch)
        x0, scored = texts.x0.to(self.device), texts.scored.to(self.device)
        ids = self.module.documents(batch)[2]
        ask = asker(
            self.module.backbone,
            x0,
            block_size=texts.block_size,
            mask_id=texts.mask_id,
            document_ids=None if ids is None else ids.to(self.device),
        )
        asked = dataclasses.replace(texts, x0=x0, scored=scored)
        bar = self.trainer.progress_bar_callback
        passes = sum(each.passes(texts.block_size, draws) for each, draws in self.draws.items())
        done = itertools.count(1)

        def counted(*question):
            answer = ask(*question)
            if bar is not None:
                part = min(1, next(done) / passes)  # a batch of which some is there has fewer
                bar.on_validation_part(self.trainer, self, index + part)
            return answer

        return asked, counted

    def _draw(self, batch: dict, each: Chosen, texts: AskedTexts, ask: Ask, draw: int) -> Tensor:
        """Nats per token, [B, L]."""
        if each.name != "nelbo":
            return each.estimate(ask, texts, chance(self.module, batch, draw))
        weight = weights_by_time(self.module, batch, draw).to(self.device)
        return weight * texts.surprisal(ask, weight > 0)

    def on_validation_epoch_end(self) -> None:
        mine = self.seen, {each.label: results for each, results in self.results.items()}
        of_all = [mine]
        if self.trainer.world_size > 1:
            of_all = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(of_all, mine)
        rows = {row for seen, _ in of_all for row in seen}
        for each in self.results:
            parts = [results[each.label] for _, results in of_all]
            joined = RowResults(each.kind.sampled)
            for part in parts:
                joined.rows |= part.rows
            seconds = max(part.seconds for part in parts)
            self.found[each] = joined.likelihood(rows), seconds


def journal_facts(config: Config, checkpoint: Checkpoint, rows: dict) -> dict:
    """All that shapes the nll of a row. rows: what the validation split was made from."""
    return {
        "weights": [checkpoint.fingerprint, config.eval.disable_ema],
        "data": rows,
        "algo": dataclasses.asdict(config.algo),
        "block_size": config.block_size,
        "noise": [config.noise.type, config.training.sampling_eps, config.training.eval_nll],
        "antithetic": [config.training.antithetic_sampling, config.loader.eval_global_batch_size],
        "resample": config.training.resample,
        "draws": config.eval.draws,
        "seed": config.seed,
        "streams": streams_version(checkpoint),
        "precision": config.trainer.precision,
    }


def result_path(config: Config, checkpoint: Checkpoint, wanted: list[Chosen]) -> Path:
    """ppl_DATA-WEIGHTS.json in the run folder; the bound of one draw needs no name of its own, nor
    does the block size that the checkpoint tells."""
    weights = checkpoint.fingerprint[:8] + ("-raw" if config.eval.disable_ema else "")
    labels = [each.label.replace(":", "_") for each in wanted]
    if len(wanted) == 1 and wanted[0].kind.law == BOUND:
        writes = get_algorithm(config.algo.name).writes
        labels = [name for name in labels if name == "exact" and writes != "ar"]
    trained = trained_sizes(checkpoint, config.algo.name)
    if trained and config.block_size != checkpoint.block_size:
        labels.insert(0, f"S{config.block_size}")
    name = "-".join([f"ppl_{Path(str(config.data.valid)).stem}", weights, *labels])
    return settings.local_folder(config.checkpointing.save_dir) / f"{name}.json"


def report(config: Config, found: dict[Chosen, tuple[Likelihood, float]], path: Path) -> None:
    """The results as lines and, beside the run, as JSON; of several the first stands on top."""
    if rank() != 0:
        return
    about = {
        "mode": "ppl_eval",
        "algo": config.algo.name,
        "block_size": config.block_size,
        "data": config.data.valid,
        "checkpoint": config.eval.checkpoint_path,
        "ema": not config.eval.disable_ema,
        "precision": config.trainer.precision,
        "seed": config.seed,
    }
    ar = get_algorithm(config.algo.name).writes == "ar"
    exact = ar or (config.block_size == 1 and config.training.eval_nll)
    entries = [
        likelihood_entry(each, result, seconds, config.eval.draws, exact)
        for each, (result, seconds) in found.items()
    ]
    several = {"likelihoods": entries} if len(entries) > 1 else {}
    for entry, (result, _) in zip(entries, found.values(), strict=True):
        name = f"{entry['likelihood']}, {entry['bound']}"
        say(f"{config.algo.name} on {config.data.valid} ({name}): {result}")
    write_json(path, {**about, **entries[0], **several})
    seconds = sum(seconds for _, seconds in found.values())
    rate = entries[0]["tokens"] / max(seconds, 1e-9)  # of the text, by all likelihoods together
    say(f"{rate:,.0f} tokens/s, {seconds:.1f} s; written to {path}")


def likelihood_entry(
    each: Chosen, found: Likelihood, seconds: float, draws: int, exact: bool
) -> dict:
    """One likelihood in the JSON file. Errors are one standard error, null where one row or one
    draw cannot tell; draw_error is the part of nll_error that more draws would lower."""

    def known(value: float) -> float | None:
        return value if math.isfinite(value) else None

    draw_error = 0.0 if exact else found.draw_error
    return {
        "likelihood": each.label,
        "bound": "exact" if exact else each.kind.law,
        "draws": draws if each.kind.sampled else 1,
        "ppl": found.ppl,
        "ppl_error": known(found.ppl_error),
        "nll": found.nll,
        "nll_error": known(found.nll_error),
        "draw_error": known(draw_error),
        "bpd": found.bpd,
        "tokens": found.tokens,
        "rows": found.rows,
        "seconds": round(seconds, 1),
        "tokens_per_second": found.tokens / max(seconds, 1e-9),
    }
