"""Generative perplexity against entropy, for several checkpoints and step rules.

    python scripts/frontier.py my_run/checkpoints/last.ckpt ar=other_run/checkpoints/last.ckpt \\
        --judge judge_run/checkpoints/last.ckpt --steps first_hitting,confidence,threshold \\
        --temperatures 0.8,1 --nfe 32,128 --set threshold=0.6,0.9 --reference shakespeare

A point is a checkpoint with a step rule, a number of evaluations (NFE) and a temperature. Lower
generative perplexity at the same entropy is better; a lower one alone may be a lower temperature.
OUT gets frontier.csv, frontier.json and frontier.png with the points of the last command, and the
texts of all: the same command again goes on where it was. ar and sedd have samplers of their own,
so each has them in place of the step rules. What stands behind -- are settings of main.py for the
data, such as data.source=/corpora.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpointing.checkpoint import fingerprint
from checkpointing.load import say_untrained
from evaluation.judge import Judge, load_judge
from evaluation.quality import judged, number
from samplers.params import SamplingParams
from samplers.steps import STEPS
from samplers.writing import SAMPLERS
from sampling.notebook import Writer, load
from sampling.report import NUMBERS, UNTOLD, made_with, read_numbers
from sampling.run import Model, Output, SamplingRun, Texts, run_id
from sampling.sample_file import SampleFile
from scripts.support.command import at_least, chosen_device, new_parser, parsed
from scripts.support.frontier_report import COLUMNS, REAL, as_text, draw, matched, short, write
from scripts.support.texts import cache_folder, read_texts
from utils import reason, say, shown

# --set does not take what is part of no point and what has an option
NOT_SET = (*UNTOLD, "length", "steps", "temperature", "nucleus_p")
SETTABLE = {name: kind for name, kind in NUMBERS.items() if name not in NOT_SET}
FROM_REPORT = {  # a column by another name
    "nfe": "gen_nfes",
    "entropy": "gen_entropy",
    "entropy_error": "gen_entropy_error",
    "length": "gen_lengths",
    "texts": "rows",
}


@dataclass(frozen=True)
class Point:
    """`numbers`: what the rule reads, and what --nfe made of it."""

    model: str
    rule: str
    numbers: dict
    run: SamplingRun

    @property
    def text(self) -> str:
        said = {**self.numbers, "temperature": self.run.model.params.temperature}
        return ", ".join([self.model, self.rule, *(f"{k} {v}" for k, v in said.items())])


def main(argv=None) -> int:
    args, words = parse(argv)
    try:
        judge = judge_of(args, words)
        points = [
            p for name, path in args.checkpoints for p in plan(name, path, judge, args, words)
        ]
        for name in dict(args.set).keys() - {name for p in points for name in p.numbers}:
            raise ValueError(
                f"--set {name}: no point reads it, leave it out or add a rule to --steps"
            )
        real = reference(args, judge, words)
        say(f"{len(points)} points of {args.texts} texts, judged by {args.judge}")
    except (ValueError, OSError) as error:
        print(shown(reason(error)), file=sys.stderr)
        return 2
    try:
        rows = [real] if real else []
        for point, left in with_time_left(points):
            say(f"point {points.index(point) + 1} of {len(points)}: {point.text}{left}")
            rows.append(row(point, point.run.complete()))
            write(args.out, rows, args)
        draw(rows, args.out / "frontier.png", args.judge)
    except (OSError, MemoryError) as error:
        print(shown(reason(error)), file=sys.stderr)
        return 1
    print(as_text(rows))
    for line in matched(rows):
        print(line)
    say(f"written to {args.out}: frontier.csv, frontier.json, frontier.png and the texts")
    return 0


def parse(argv) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings of main.py behind --."""
    parser = new_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=named, help="[NAME=]file, export or hub id")
    parser.add_argument("--judge", default="gpt2-large", help="causal model or ar checkpoint")
    parser.add_argument("--steps", default="first_hitting", help="rules, separated by commas")
    parser.add_argument("--temperatures", type=floats, default=[0.8, 0.9, 1.0])
    parser.add_argument(
        "--nfe", type=evaluations, help="about so many evaluations a text: sets k, T"
    )
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=1,2")
    parser.add_argument("--texts", type=at_least(1), default=64, help="of each point (%(default)s)")
    parser.add_argument(
        "--length", type=at_least(2), help="tokens of a text (that of the training)"
    )
    parser.add_argument("--batch-size", type=at_least(1), help="texts side by side (all)")
    parser.add_argument("--judge-batch-size", type=at_least(1), default=16)
    parser.add_argument("--nucleus-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reference", help="real texts: a file, or a corpus such as shakespeare")
    parser.add_argument("--device", help="(the accelerator, if there is one)")
    parser.add_argument("--out", type=Path, default=Path("outputs/frontier"), help="(%(default)s)")
    args, words = parsed(parser, argv)
    for rule in args.steps.split(","):
        if rule not in STEPS:
            parser.error(f"--steps: {rule} is none of {', '.join(STEPS)}")
    names = [name for name, _ in args.checkpoints]
    if len(set(names)) < len(names):
        parser.error(f"two checkpoints are called {names}: give NAME=PATH")
    return args, words


def floats(text: str) -> list[float]:
    return [float(each) for each in text.split(",")]


def evaluations(text: str) -> list[float]:
    found = floats(text)
    if not all(0 < each < math.inf for each in found):
        raise argparse.ArgumentTypeError(f"{text} must be numbers above 0")
    return found


def named(text: str) -> tuple[str, str]:
    name, _, path = text.rpartition("=")
    return name or short(path), path


def setting(text: str) -> tuple[str, list]:
    name, _, values = text.partition("=")
    if name not in SETTABLE:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(SETTABLE)}")
    found = [SETTABLE[name](each) for each in values.split(",")]
    if SETTABLE[name] is float and not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"{name}={values} must be finite numbers")
    return name, found


def judge_of(args, words) -> Judge:
    """Special tokens of a writer are known later, see `plan`."""
    return load_judge(
        args.judge,
        batch_size=args.judge_batch_size,
        device=chosen_device(args.device),
        setting="--judge",
        cache_dir=cache_folder(words),
    )


def plan(name: str, path: str, judge: Judge, args, words) -> list[Point]:
    """The points of a checkpoint, all checked. ValueError where one cannot be."""
    writer = load(path, device=chosen_device(args.device), cache_dir=cache_folder(words))
    length = args.length or writer.params.context_size
    base = {
        "length": length,
        "seed": args.seed,
        "batch_size": args.batch_size or args.texts,
        "nucleus_p": args.nucleus_p,
    }
    if writer.writes == "bamdlm":
        say_untrained(writer.trained, dict(args.set).get("block_size", ()))
    file = SampleFile(args.out / f"{name}.csv")
    file.check()
    weights = fingerprint(writer.denoise.backbone.state_dict())
    judge = judge.of_writer(writer.tokenizer.hf.all_special_tokens)
    judged_by = [judge.fingerprint, *judge.foreign]
    about = {"checkpoint": path, "judge": args.judge, "precision": "32-true"}
    found = {}
    for rule, numbers in rules(writer, length, args):
        for temperature in args.temperatures:
            params = writer.asked({**base, "temperature": temperature, **numbers})
            asked = writer.denoiser(params)
            model = Model(writer.algo, asked, writer.tokenizer, params, writer.device)
            run = run_id(weights, made_with(writer.algo, params), params.seed, *judged_by)
            output = Output(file, run, about=about)
            numbers_of_rule = {k: v for k, v in numbers.items() if k != "steps"}
            made = SamplingRun(model, Texts(args.texts), output, judge)
            found.setdefault(run, Point(name, rule, numbers_of_rule, made))
    return list(found.values())


def rules(writer: Writer, length: int, args) -> Iterator[tuple[str, dict]]:
    """(name, changes of the parameters) of each way to write that the algorithm has."""
    base = writer.params
    chosen = dict(args.set)
    follows = "steps" in SAMPLERS[writer.writes].can
    for rule in args.steps.split(",") if follows else [writer.writes]:
        steps = {"steps": rule} if follows else {}
        read = read_numbers(writer.algo, base.changed(**steps)) & SETTABLE.keys()
        grid = {name: values for name, values in chosen.items() if name in read}
        blocks = [{"block_size": size} for size in grid.pop("block_size", ())] or [{}]
        for nfe, own in itertools.product(args.nfe or [None], blocks):
            size, rounds = filled_together(writer.writes, base.changed(**own), length)
            each = max(1.0, (nfe or length) / rounds)  # evaluations of a block or window
            if "num_steps" in read - chosen.keys():
                grid["num_steps"] = [round(each)]
            if "k" in read - chosen.keys() and nfe:
                grid["k"] = [min(size, max(1, round(size / each)))]
            for values in itertools.product(*grid.values()):
                yield rule, dict(zip(grid, values, strict=True)) | own | steps


def filled_together(writes: str, params: SamplingParams, length: int) -> tuple[int, float]:
    """How many tokens of a text a round of the sampler fills, and how many rounds there are."""
    if writes == "bamdlm":
        size = max(1, params.block_size)  # 0 is refused later
        return size, length / size
    if writes == "mdlm":
        size = min(params.window, length)
        return size, 1 + max(0, length - size) / max(1, size // 2)
    return length, 1


def with_time_left(points: list[Point]) -> Iterator[tuple[Point, str]]:
    """Each with what remains, after those of this start. Points that are done take no time."""
    started, done = time.monotonic(), 0
    todo = sum(bool(point.run.missing()) for point in points)
    for point in points:
        missing = bool(point.run.missing())
        left = (time.monotonic() - started) / done * (todo - done) if done else 0
        yield point, f", about {left:,.0f} s left" if done and missing else ""
        done += missing


def reference(args, judge: Judge, words) -> dict | None:
    """The row of real texts, as long as those of the models."""
    if args.reference is None:
        return None
    # BOS, which the judge adds, is one of the tokens of a model's text
    length = args.length - len(judge.bos) if args.length else judge.context
    texts = read_texts(args.reference, length, args.texts, words)
    found = judged(judge, texts)
    errors = {f"{name}_error": number(found[name].error) for name in ("gen_ppl", "entropy")}
    values = {name: number(figure.value) for name, figure in found.items()} | errors
    return {**dict.fromkeys(COLUMNS), **values, "model": REAL}


def row(point: Point, report: dict) -> dict:
    found = {name: report.get(FROM_REPORT.get(name, name)) for name in COLUMNS}
    said = " ".join(f"{name}={value}" for name, value in point.numbers.items())
    return found | {"model": point.model, "steps": point.rule, "numbers": said}


if __name__ == "__main__":
    sys.exit(main())
