"""What the quickstart learned, on one page: the last step of scripts/quickstart.sh.

    python scripts/quickstart_report.py OVERRIDES of the training run, then -- those of the sampling

Reads what training, evaluation and sampling left behind; computes only the unigram model.
"""

import csv
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plot_run import plot

import settings
from modes.build import build_rows, build_tokenizer
from training.csv_log import read_log

SAMPLE_LINES = 16


def unigram_nats(train: np.ndarray, valid: np.ndarray, vocab_size: int) -> float:
    """Nats per validation token under the training frequencies, every id counted once more."""
    counts = np.bincount(train.ravel(), minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[valid.ravel()].mean())


def tokens_per_second(log: Path, tokens_per_step: int) -> float:
    """Of training alone: the median over the intervals between logged losses."""
    steps, rates = [], []
    with log.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["name"] == "trainer/loss":
                steps.append((int(row["step"]), float(row["unix_time"])))
    for (before, started), (after, ended) in itertools.pairwise(steps):
        if after > before and ended > started:
            rates.append((after - before) * tokens_per_step / (ended - started))
    return float(np.median(rates)) if rates else math.nan


def main(arguments: list[str]) -> int:
    cut = arguments.index("--")
    run = settings.load(arguments[:cut])
    sampling = settings.load(arguments[cut + 1 :])
    folder = Path(run.checkpointing.save_dir)
    results = folder.glob(f"ppl_{Path(run.data.valid).stem}-*.json")
    found = json.loads(max(results, key=lambda path: path.stat().st_mtime).read_text())
    samples = json.loads(Path(sampling.sampling.logdir).with_suffix(".json").read_text())
    tokenizer = build_tokenizer(run)
    train, valid = (build_rows(run, tokenizer, split).ids for split in ("train", "valid"))
    unigram = math.exp(unigram_nats(train, valid, tokenizer.vocab_size))
    text = "".join(tokenizer.decode(row.tolist()) for row in valid)
    characters = len(text.replace(tokenizer.decode([tokenizer.eos_id]), ""))
    bits = found["nll"] * found["tokens"] / math.log(2) / characters
    rate = tokens_per_second(
        folder / "metrics.csv", run.loader.global_batch_size * run.model.length
    )
    steps = max(read_log(folder / "metrics.csv")["trainer/loss"]) + 1
    with Path(sampling.sampling.logdir).open(newline="") as file:
        sample = next(csv.DictReader(file))["samples"]
    picture = plot(folder, folder / "curve.png")
    length, trained = sampling.model.length, run.model.length
    verdict = "below half of it" if found["ppl"] < unigram / 2 else "NOT below half of it"
    page = {
        "validation perplexity": f"{found['ppl']:.1f} ± {found['ppl_error']:.1f}, {found['bound']}",
        "unigram model": f"{unigram:.1f}; the model is {verdict}",
        "bits per character": f"{bits:.3f}",
        "training": f"{rate:,.0f} tokens/s",
        "sampling": f"{samples['gen_nfes']:.0f} network evaluations (NFE) per text,"
        f" {samples['tokens_per_second']:,.0f} tokens/s",
        "text length": f"{length} tokens, {length / trained:g} x the training context",
        "curves": picture,
        "texts": sampling.sampling.logdir,
    }
    batch = f"{run.loader.global_batch_size} x {trained} tokens"
    print(f"\nBAM-DLM, block size {run.block_size}: {steps:,} steps of {batch}\n")
    for name, value in page.items():
        print(f"  {name:22} {value}")
    print("\nThe first lines of a text:\n")
    lines = [line for line in sample.splitlines() if line.strip()][:SAMPLE_LINES]
    print("\n".join(f"  | {line}" for line in lines))
    return 0 if found["ppl"] < unigram / 2 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
