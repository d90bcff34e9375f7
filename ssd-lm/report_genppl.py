"""Generative perplexity, entropy, length and count of SSD-LM samples (by evaluation/judge.py).

    python ssd-lm/report_genppl.py sample_logs/ssd-lm                     every .jsonl of a folder
    python ssd-lm/report_genppl.py a.jsonl b.jsonl --judge gpt2-large --out report.json
    python ssd-lm/report_genppl.py a.jsonl --judge none                   entropy and length only

One row a file, samples ordered by index. Perplexity is over the tokens of all texts; `mean` is the
mean of the samples' own. Entropy (nats) and length are means over samples, of the judge's tokens,
or without a judge of the model's.
"""

import argparse
import math
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # generative

from ssd_samples import SamplesError, read

from utils import reason, shown, write_json

COLUMNS = {
    "gen_ppl": "gen_ppl",
    "mean_gen_ppl": "mean",
    "entropy": "entropy",
    "length": "length",
    "nfe": "NFE",
}
SUFFIXES = (".jsonl", ".json")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        files = find_files(args.files)
        samples = {file: read(file) for file in files}
        check(args, samples)
        rows = report(args, samples)
    except (SamplesError, ValueError) as error:
        print(f"this report cannot be made:\n  - {shown(reason(error))}", file=sys.stderr)
        return 2
    print(table(rows, args.judge))
    if args.out:
        write_json(Path(args.out).expanduser(), {"judge": args.judge, "files": rows})
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="report_genppl.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("files", nargs="+", metavar="FILE", help="samples, or folders of them")
    p.add_argument("--judge", default="gpt2-large", help="folder or hub id, or none (%(default)s)")
    p.add_argument("--batch_size", type=int, default=8, help="windows at once (%(default)s)")
    p.add_argument("--device", help="the accelerator if there is one, else cpu")
    p.add_argument("--out", metavar="FILE", help="the same figures and those of each sample, JSON")
    return p


def find_files(names: list[str]) -> list[Path]:
    found = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES)
            if not inside:
                raise ValueError(f"{path} holds no file of samples (.jsonl)")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path} does not exist; generate_text.py writes files of samples")
    return found


def check(args, samples: dict[Path, list[dict]]) -> None:
    if args.batch_size < 1:
        raise ValueError(f"--batch_size={args.batch_size} must be at least 1")
    if args.out and not Path(args.out).expanduser().resolve().parent.is_dir():
        raise ValueError(f"--out={args.out}: its folder does not exist")
    for file, records in samples.items():
        if not records:
            raise ValueError(f"{file} holds no finished sample yet")
        if args.judge == "none" and not all("token_ids" in record for record in records):
            raise ValueError(f"{file} has texts without token_ids: only a judge can count those")


def report(args, samples: dict[Path, list[dict]]) -> list[dict]:
    """One row a file."""
    from evaluation.quality import perplexity

    rows = []
    for file, scores in zip(samples, score(args, list(samples.values())), strict=True):
        records = samples[file]
        own = [s.perplexity for s in scores if math.isfinite(s.perplexity)]
        rows.append(
            {
                "file": str(file),
                "samples": len(records),
                "gen_ppl": finite(perplexity(scores).value),
                "mean_gen_ppl": fmean(own) if own else None,
                "entropy": fmean(s.entropy for s in scores),
                "length": fmean(s.tokens for s in scores),
                "nfe": mean_of(records, "nfe"),
                "seconds": mean_of(records, "total_seq_time"),
                "each": [
                    {
                        "index": record.get("index", place),
                        "gen_ppl": finite(s.perplexity),
                        "entropy": s.entropy,
                        "length": s.tokens,
                    }
                    for place, (record, s) in enumerate(zip(records, scores, strict=True))
                ],
            }
        )
    return rows


def score(args, files: list[list[dict]]):
    """The scores of each file's samples; the judge is loaded once."""
    if args.judge == "none":
        from evaluation.judge import describe

        for records in files:
            eos = [r.get("settings", {}).get("eos_token_id", -1) for r in records]
            yield [describe(r["token_ids"], e) for r, e in zip(records, eos, strict=True)]
        return
    from ssd_model import pick_device
    from transformers.utils import logging

    from evaluation.judge import load_judge

    logging.disable_progress_bar()
    # The writer's special tokens are the judge's EOS, as for every other model here.
    foreign = {t for records in files for r in records for t in special_tokens(r)}
    options = {"batch_size": args.batch_size, "device": pick_device(args.device)}
    try:
        judge = load_judge(args.judge, foreign=sorted(foreign), **options)
    except ValueError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(
            f"--judge={args.judge} cannot be loaded ({reason}); give the folder of a causal"
            " language model, or --judge none"
        ) from error
    for records in files:
        yield judge.score([record["sampled_sequences"] for record in records])


def special_tokens(record: dict) -> list[str]:
    return record.get("settings", {}).get("special_tokens", [])


def mean_of(records: list[dict], key: str) -> float | None:
    """None where a record lacks it: the reference's have no nfe."""
    return fmean(r[key] for r in records) if all(key in r for r in records) else None


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(rows: list[dict], judge: str) -> str:
    tokens = "the model's own tokens" if judge == "none" else f"the tokens of {judge}"
    lines = ["".join(f"{name:>10}" for name in ("samples", *COLUMNS.values())) + "  file"]
    for row in rows:
        figures = ["-" if row[key] is None else f"{row[key]:.2f}" for key in COLUMNS]
        shown = "".join(f"{figure:>10}" for figure in (row["samples"], *figures))
        lines.append(f"{shown}  {row['file']}")
    return "\n".join([*lines, f"entropy in nats and length are over {tokens}; EOS is not counted"])


if __name__ == "__main__":
    sys.exit(main())
