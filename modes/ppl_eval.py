"""mode=ppl_eval: measure the perplexity of a checkpoint on the validation split."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch

import settings
from checkpointing.as_trained import streams_version
from checkpointing.checkpoint import Checkpoint
from checkpointing.load import say_untrained, trained_sizes
from evaluation.journal import Journal
from evaluation.likelihood import Likelihood, of_rows
from evaluation.mixture import mixture
from evaluation.table import BOUND, check_likelihoods, parse_likelihood
from modes.build import evaluated_module, trained_module
from modes.build_data import build_data, build_tokenizer, validated_rows
from modes.evaluator import Evaluator, Measure
from objectives.algorithms import get_algorithm
from settings import Config
from training.flops import matmul_dtype
from training.trainer import build_trainer
from utils import listed, rank, say, write_json


def prepare(config: Config) -> Callable[[], None]:
    L.seed_everything(config.seed, workers=True, verbose=False)
    wanted = measures(config)
    sizes = list(dict.fromkeys(each.size for each in wanted))
    at = {size: dataclasses.replace(config, block_size=size) for size in sizes}
    tokenizer = build_tokenizer(config)
    module, checkpoint = trained_module(at[sizes[0]], tokenizer)
    say_untrained(trained_sizes(checkpoint, config.algo.name), sizes)
    modules = {sizes[0]: module}
    for size in sizes[1:]:
        modules[size] = evaluated_module(at[size], module.backbone, tokenizer, checkpoint)
    data = build_data(config, tokenizer, train=False)
    for each in modules.values():
        each.validation_rows = len(data.valid)
    place = result_path(config, checkpoint, wanted)
    journals = {}
    for each in wanted:
        facts = {"likelihood": each.chosen.label}
        facts |= journal_facts(at[each.size], checkpoint, data.valid.about)
        journals[each] = Journal(place.with_suffix(".rows"), facts, rank())
    evaluator = Evaluator(modules, journals, config.eval.draws)
    precision = config.trainer.precision
    if not evaluator.at_once and precision.endswith("-mixed"):
        module.backbone.freeze(matmul_dtype(precision))
    trainer = build_trainer(config, loggers=[])

    def run() -> None:
        rows = f"{validated_rows(config, len(data.valid)):,} rows of {config.model.length:,} tokens"
        for each in wanted:
            passes = 1 if evaluator.at_once else each.passes(config.eval.draws)
            word = "pass" if passes == 1 else "passes"
            say(f"{evaluator.name(each)}: {passes:,} {word} over {rows}")
        trainer.validate(evaluator, datamodule=data, verbose=False)
        report(config, evaluator, place)
        for journal in journals.values() if rank() == 0 else ():
            journal.remove()

    return run


def measures(config: Config) -> list[Measure]:
    """What is asked for: all of eval.likelihood at one block size; at each of eval.block_sizes the
    first of them that takes no more than eval.max_passes. ValueError where one cannot be."""
    wanted = [parse_likelihood(label) for label in config.eval.likelihood]
    writes = get_algorithm(config.algo.name).writes
    draws, most = config.eval.draws, config.eval.max_passes
    limits = {"algo": writes, "draws": draws, "most": most}
    if config.eval.block_sizes is None:
        size = config.model.length if writes == "mdlm" else config.block_size
        check_likelihoods(wanted, block_size=size, **limits)
        return [Measure(size, each) for each in wanted]
    found = []
    for size in config.eval.block_sizes:
        chosen = next((each for each in wanted if each.passes(size, draws) <= most), wanted[-1])
        check_likelihoods([chosen], block_size=size, **limits)
        if chosen.kind.sampled and draws < 2:
            raise ValueError(
                f"eval.draws={draws}: at block_size={size} eval.likelihood={chosen.label} is"
                " estimated, and of one draw nobody can tell how much too low the likelihood of"
                " the mixture comes out; set eval.draws=2 or more"
            )
        found.append(Measure(size, chosen))
    return found


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


def result_path(config: Config, checkpoint: Checkpoint, wanted: list[Measure]) -> Path:
    """ppl_DATA-WEIGHTS.json in the run folder; the bound of one draw needs no name of its own, nor
    does the block size that the checkpoint tells."""
    weights = checkpoint.fingerprint[:8] + ("-raw" if config.eval.disable_ema else "")
    labels = [each.chosen.label.replace(":", "_") for each in wanted]
    if len(wanted) == 1 and wanted[0].chosen.kind.law == BOUND:
        writes = get_algorithm(config.algo.name).writes
        labels = [name for name in labels if name == "exact" and writes != "ar"]
    trained = trained_sizes(checkpoint, config.algo.name)
    if (mixed := config.eval.block_sizes) is not None:
        shares = [f"{size}x{share:.3g}" for size, share in mixed.items()]
        labels = ["mixture", *shares, *dict.fromkeys(labels)]
    elif trained and config.block_size != checkpoint.block_size:
        labels.insert(0, f"S{config.block_size}")
    name = "-".join([f"ppl_{Path(str(config.data.valid)).stem}", weights, *labels])
    return settings.local_folder(config.checkpointing.save_dir) / f"{name}.json"


def report(config: Config, done: Evaluator, path: Path) -> None:
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
    entries = [
        likelihood_entry(config, each, result, seconds)
        for each, (result, seconds) in done.found.items()
    ]
    results = [result for result, _ in done.found.values()]
    seconds = sum(seconds for _, seconds in done.found.values())
    if config.eval.block_sizes is not None:
        about["block_sizes"] = config.eval.block_sizes
        for entry, each in zip(entries, done.found, strict=True):
            entry["block_size"] = each.size
        mixed, result = mixture_entry(config, done, entries, seconds)
        entries, results = [mixed, *entries], [result, *results]
    several = {"likelihoods": entries} if len(entries) > 1 else {}
    for entry, result in zip(entries, results, strict=True):
        at = f"block_size={entry['block_size']}, " if entry.get("block_size") else ""
        names = dict.fromkeys((entry["likelihood"], entry["bound"]))  # exact may be both
        say(f"{config.algo.name} on {config.data.valid} ({at}{', '.join(names)}): {result}")
        if entry.get("low_ppl") is not None:
            say(
                f"the mean of the draws in its formula gives perplexity {entry['low_ppl']:.3f},"
                " which is too low in expectation: the mixture lies between the two"
            )
    write_json(path, {**about, **entries[0], **several})
    rate = entries[0]["tokens"] / max(seconds, 1e-9)  # of the text, by all likelihoods together
    say(f"{rate:,.0f} tokens/s, {seconds:.1f} s; written to {path}")


def likelihood_entry(config: Config, each: Measure, found: Likelihood, seconds: float) -> dict:
    """One likelihood in the JSON file. Errors are one standard error; draw_error is the part of
    nll_error that more draws would lower."""
    kind, exact = each.chosen.kind, is_exact(config, each)
    return {
        "likelihood": each.chosen.label,
        "bound": "exact" if exact else kind.law,
        "draws": config.eval.draws if kind.sampled else 1,
        **figures(found, seconds, 0.0 if exact else found.draw_error),
    }


def is_exact(config: Config, each: Measure) -> bool:
    """Whether it is the likelihood whatever writes the texts: of blocks of one token."""
    if get_algorithm(config.algo.name).writes == "ar":
        return True
    if config.eval.block_sizes is None:
        return each.size == 1 and config.training.eval_nll
    return each.size == 1 and (each.chosen.name != "nelbo" or config.training.eval_nll)


def mixture_entry(
    config: Config, done: Evaluator, entries: list[dict], seconds: float
) -> tuple[dict, Likelihood]:
    """The likelihood of the mixture over eval.block_sizes; each of `entries`, those of the sizes,
    gets its weight, and its posterior share of the texts."""
    sizes, rows = config.eval.block_sizes, sorted(done.rows)
    measured = [[results.rows[row] for row in rows] for results in done.measured.values()]
    nll = [torch.tensor([nll for _, nll in each], dtype=torch.float64) for each in measured]
    tokens = torch.tensor([tokens for tokens, _ in measured[0]])
    mixed = mixture(nll, list(sizes.values()))
    text = tokens > 0
    for entry, weight, share in zip(entries, sizes.values(), mixed.share.T, strict=True):
        entry["weight"], entry["share"] = weight, float(share[text].mean())
    result, low = (of_rows(x[:, None], tokens, False) for x in (mixed.nll, mixed.low))
    drawn = any(each.chosen.kind.sampled for each in done.found)
    bounds = any("bound" in entry["bound"] for entry in entries)
    entry = {
        "likelihood": f"mixture of {listed(sizes)}",
        "bound": "upper bound" if bounds else "exact for texts of the mixture",
        "block_size": None,
        "draws": config.eval.draws if drawn else 1,
        **figures(result, seconds, math.nan if drawn else 0.0),
        "low_ppl": low.ppl if drawn else None,
        "low_nll": low.nll if drawn else None,
    }
    return entry, result


def figures(found: Likelihood, seconds: float, draw_error: float) -> dict:
    """Of the JSON file; null where one row or one draw cannot tell."""

    def known(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
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
