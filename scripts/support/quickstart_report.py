"""What the quickstart learned, on one page: the last step of scripts/quickstart.sh.

    python scripts/support/quickstart_report.py OVERRIDES of the training, then -- of the sampling

Reads what training, evaluation and sampling left behind; computes only the unigram model.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import settings
from modes.build_data import build_rows, build_tokenizer
from sampling.sample_file import SampleFile
from scripts.plot_run import plot
from settings.defaults import all_devices
from training.log_reading import read_log

SAMPLE_LINES = 16


def unigram_nll(train: np.ndarray, valid: np.ndarray, vocab_size: int) -> float:
    """Nats per validation token under the training frequencies, every id counted once more."""
    counts = np.bincount(train.ravel(), minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[valid.ravel()].mean())


def bits_per_character(found: dict, valid: np.ndarray, tokenizer) -> float:
    """From the nll per token of `found`; ends of documents are no characters."""
    text = "".join(tokenizer.decode(row.tolist()) for row in valid)
    characters = len(text.replace(tokenizer.decode([tokenizer.eos_id]), ""))
    return found["nll"] * found["tokens"] / math.log(2) / characters


def page(run: settings.Config, sampling: settings.Config, found: dict, unigram: float, bits: float):
    """{what: its value}, one line each."""
    folder, texts = Path(run.checkpointing.save_dir), Path(sampling.sampling.logdir)
    samples = json.loads(texts.with_suffix(".json").read_text())
    rates = [*read_log(folder / "metrics.csv")["throughput/tokens_per_second"].values()]
    rate = np.median(rates) * all_devices(run)
    length = sampling.model.length
    verdict = "below half of it" if found["ppl"] < unigram / 2 else "NOT below half of it"
    return {
        "validation perplexity": f"{found['ppl']:.1f} ± {found['ppl_error']:.1f}, {found['bound']}",
        "unigram model": f"{unigram:.1f}; the model is {verdict}",
        "bits per character": f"{bits:.3f}",
        "training": f"{rate:,.0f} tokens/s",
        "sampling": f"{samples['gen_nfes']:.0f} network evaluations (NFE) per text,"
        f" {samples['tokens_per_second']:,.0f} tokens/s",
        "text length": f"{length} tokens, {length / run.model.length:g} x the training context",
        "curves": plot(folder, folder / "curve.png"),
        "texts": texts,
    }


def main(arguments: list[str]) -> int:
    if "--" not in arguments:
        print(__doc__)
        return 0 if arguments == ["--help"] else 2
    cut = arguments.index("--")
    run, sampling = settings.load(arguments[:cut]), settings.load(arguments[cut + 1 :])
    tokenizer = build_tokenizer(run)
    train, valid = (build_rows(run, tokenizer, split).ids for split in ("train", "valid"))
    unigram = math.exp(unigram_nll(train, valid, tokenizer.vocab_size))
    results = Path(run.checkpointing.save_dir).glob(f"ppl_{Path(run.data.valid).stem}-*.json")
    found = json.loads(max(results, key=lambda path: path.stat().st_mtime).read_text())
    lines = page(run, sampling, found, unigram, bits_per_character(found, valid, tokenizer))
    steps = max(read_log(Path(run.checkpointing.save_dir) / "metrics.csv")["trainer/loss"])
    batch = f"{run.loader.global_batch_size} x {run.model.length} tokens"
    print(f"\nBAM-DLM, block size {run.block_size}: {steps:,} steps of {batch}\n")
    for name, value in lines.items():
        print(f"  {name:22} {value}")
    sample = next(iter(SampleFile(sampling.sampling.logdir)))
    print("\nThe first lines of a text:\n")
    shown = [line for line in sample.samples.splitlines() if line.strip()][:SAMPLE_LINES]
    print("\n".join(f"  | {line}" for line in shown))
    return 0 if found["ppl"] < unigram / 2 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
