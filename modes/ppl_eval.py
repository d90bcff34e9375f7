"""mode=ppl_eval: measure the perplexity of a checkpoint on the validation split."""

import time
from collections.abc import Callable
from pathlib import Path

import lightning as L

import settings
from checkpointing.load import Checkpoint
from evaluation.likelihood import Likelihood
from modes.build import build_data, build_tokenizer, trained_module
from settings import Config
from training.trainer import build_trainer
from utils import rank, say, write_json


def prepare(config: Config) -> Callable[[], None]:
    L.seed_everything(config.seed, workers=True, verbose=False)
    tokenizer = build_tokenizer(config)
    module, checkpoint = trained_module(config, tokenizer)
    data = build_data(config, tokenizer, train=False)
    trainer = build_trainer(config, loggers=[])

    def run() -> None:
        started = time.monotonic()
        trainer.validate(module, datamodule=data, verbose=False)
        report_likelihood(config, checkpoint, module.validated, time.monotonic() - started)

    return run


def report_likelihood(
    config: Config, checkpoint: Checkpoint, found: Likelihood, seconds: float
) -> None:
    """The result as lines and, beside the run, as JSON."""
    exact = config.algo.name == "ar" or (config.block_size == 1 and config.training.eval_nll)
    summary = {
        "mode": "ppl_eval",
        "algo": config.algo.name,
        "block_size": config.block_size,
        "data": config.data.valid,
        "checkpoint": config.eval.checkpoint_path,
        "ema": not config.eval.disable_ema,
        "bound": "exact" if exact else "upper bound (NELBO)",
        "ppl": found.ppl,
        "ppl_error": found.ppl_error,
        "nll": found.nll,
        "bpd": found.bpd,
        "tokens": found.tokens,
        "rows": found.rows,
        "precision": config.trainer.precision,
        "seed": config.seed,
        "seconds": round(seconds, 1),
        "tokens_per_second": found.tokens / seconds,
    }
    if rank() != 0:
        return
    weights = checkpoint.fingerprint[:8] + ("-raw" if config.eval.disable_ema else "")
    name = f"ppl_{Path(str(config.data.valid)).stem}-{weights}.json"
    path = settings.local_folder(config.checkpointing.save_dir) / name
    say(f"{config.algo.name} on {config.data.valid} ({summary['bound']}): {found}")
    write_json(path, summary)
    say(f"{summary['tokens_per_second']:,.0f} tokens/s, {seconds:.1f} s; written to {path}")
