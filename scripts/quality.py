"""What texts are worth, beside real ones.

    python scripts/quality.py samples.csv --judge ar_run/checkpoints/last.ckpt \\
        --reference shakespeare

Generative perplexity, entropy, distinct-n, repetition, length and, with --reference, MAUVE: of each
run in a file of samples, or of a .txt (a text a line) or .jsonl (field `text`). docs/evaluation.md
has the definitions. Tokens are those of the judge. Of a run also the evaluations of the network
(NFE) and the time. The table is printed; --out FILE.json has it with all digits. Features for MAUVE
are kept in --features. What stands behind -- are settings of main.py for the data, such as
data.source=/corpora.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.judge import Judge, load_judge
from evaluation.mauve import CLUSTERINGS, ceiling_halves, features, mauve
from evaluation.quality import Figure, judged
from modes import tables
from sampling.report import summarise
from sampling.sample_file import SampleFile
from scripts.support.command import answered, at_least, chosen_device, new_parser, parsed
from scripts.support.texts import cache_folder, read_texts
from utils import say, write_json

OF_RUNS = ("gen_nfes", "tokens_per_evaluation", "tokens_per_second", "seconds")
REAL = "real texts"


def main(argv=None) -> int:
    args, words = parsed(options(), argv)
    return answered("quality", lambda: run(args, words))


def run(args: argparse.Namespace, words: list[str]) -> None:
    runs = read_runs(args.samples, words)
    fewest = 2 * min(len(texts) for texts, _ in runs.values())
    if args.reference and (args.buckets or 0) > fewest:
        raise ValueError(
            f"--buckets {args.buckets}: MAUVE would have clusters of at most {fewest} texts, those"
            " of a run and as many real ones; give fewer clusters, or more texts"
        )
    judge = judge_of(args, args.judge, words)
    found = {name: judged(judge, texts) | of for name, (texts, of) in runs.items()}
    if args.reference:
        other = args.featurizer not in (None, args.judge)
        featurizer = judge_of(args, args.featurizer, words) if other else judge
        texts = {name: texts for name, (texts, _) in runs.items()}
        compare(found, texts, judge, featurizer, args, words)
    print(as_text(found))
    if args.out:
        write(found, args)
        say(f"written to {args.out}")


def options() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("samples", help=".csv of sample_eval, .txt or .jsonl")
    parser.add_argument("--judge", default="gpt2-large", help="causal model or ar checkpoint")
    parser.add_argument("--reference", help="real texts: a file, or a corpus such as shakespeare")
    parser.add_argument("--featurizer", help="causal model for MAUVE (the judge)")
    several = at_least(2)
    parser.add_argument("--length", type=several, help="tokens of a row of a corpus (as sampled)")
    parser.add_argument("--clusterings", type=several, default=CLUSTERINGS, help="(%(default)s)")
    parser.add_argument("--buckets", type=several, help="clusters (one for ten texts)")
    parser.add_argument("--batch-size", type=int, default=8, help="of the judge (%(default)s)")
    parser.add_argument("--features", type=Path, default=Path("outputs/features"))
    parser.add_argument("--device", help="(the accelerator, if there is one)")
    parser.add_argument("--out", type=Path, help="a .json file")
    return parser


def judge_of(args, name: str, words) -> Judge:
    return load_judge(
        name,
        batch_size=args.batch_size,
        device=chosen_device(args.device),
        setting="--judge" if name == args.judge else "--featurizer",
        cache_dir=cache_folder(words),
    )


def read_runs(path: str, words) -> dict[str, tuple[list[str], dict[str, Figure]]]:
    """{run: (its texts in order, what its report has beside them)}; other files are one run."""
    if Path(path).suffix != ".csv" or not Path(path).exists():
        return {Path(path).stem: (read_texts(path, 0, None, words), {})}
    file, runs = SampleFile(path), {}
    for row in file:
        runs.setdefault(row.run, {})[row.row] = row
    if not runs:
        raise ValueError(f"{path} has no sample")
    found = {}
    for run, by_number in runs.items():
        rows = [by_number[number] for number in sorted(by_number)]
        report = summarise(rows, file.notes(run), {})
        known = {name: Figure(report[name]) for name in OF_RUNS if report[name]}
        steps = rows[0].made.get("steps")
        name = run if steps is None else f"{run} {steps}"
        found[name] = [row.samples for row in rows], known
    return found


def compare(found: dict, texts: dict, judge: Judge, featurizer: Judge, args, words) -> None:
    """Adds MAUVE to what was found of each run, what two sets of real texts reach, and the figures
    of as many real texts."""
    most = max(map(len, texts.values()))
    typical = next(iter(found.values()))["length"].value
    length = args.length or max(2, round(typical) + 1 - len(judge.bos))
    real = read_texts(args.reference, length, 2 * most, words)
    found[REAL] = judged(judge, real[:most])
    made = features(featurizer, real, args.features)
    name = Path(args.featurizer or args.judge)
    name = name.parent.parent.name if name.stem == "last" else name.stem
    options = {"clusterings": args.clusterings, "buckets": args.buckets}
    for run, own in texts.items():
        one, two = ceiling_halves(len(own), len(real))
        theirs = features(featurizer, own[: len(one)], args.features)
        if len(one) < len(own):
            say(f"MAUVE of {len(one)} texts of {len(own)}: twice as many real ones are needed")
        value = mauve(theirs, made[one], **options)
        ceiling = mauve(made[two], made[one], **options)
        found[run][value.name(name)] = Figure(value.mean, value.deviation)
        found[REAL][ceiling.name(name)] = Figure(ceiling.mean, ceiling.deviation)


def as_text(found: dict[str, dict[str, Figure]]) -> str:
    names = dict.fromkeys(name for each in found.values() for name in each)
    rows = [["", *found]]
    for name in names:
        cells = [each.get(name) for each in found.values()]
        rows.append([name, *(None if x is None or math.isnan(x.value) else x for x in cells)])
    return tables.text(rows)


def write(found: dict[str, dict[str, Figure]], args) -> None:
    figures = {
        run: {name: figure.as_dict() for name, figure in each.items()}
        for run, each in found.items()
    }
    write_json(args.out, {"judge": args.judge, "reference": args.reference, "figures": figures})


if __name__ == "__main__":
    sys.exit(main())
