"""Which way of drawing noise trains the better likelihood: corpora, block sizes, variants, seeds.

    bash scripts/study.sh --jobs 4 [--sizes 4,16,L] [--variants clipped,counts] [--seeds 1,2,3]
        [--corpora shakespeare,state_of_the_union] [--out outputs/study] [-- OVERRIDES]

Every run trains for the same number of steps and is then evaluated on all held-out rows: by the
exact bound at S = 4, by `counts` with 8 draws at larger S. A difference is that to the published
recipe (clipped) with the same seed, on the same rows; its error is the standard error over seeds.

Equal time: the speed of each variant whose step is another one is measured first, alone on its
device. One that is faster or slower than the recipe by more than 5 % is trained once more, for as
many steps as fit the recipe's time, with a schedule of that length. `sizes` is one network for all
block sizes: it is trained once and evaluated at each.

With several GPUs the runs are spread over them. OUT gets a folder and a log for each run, and
runs.csv, study.csv, study.md and study.png. The same command goes on after an interruption. Words
behind -- go to every main.py.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import settings
from scripts.support.command import at_least, new_parser, parsed
from scripts.support.jobs import called, devices, side_by_side
from scripts.support.study_report import RECIPE, Line, report
from scripts.support.study_runs import BESIDE, SIZES, VARIANTS, WHOLE, Run, trainings
from training.log_reading import read_log
from utils import read_json, reason, say, shown

SAME_STEP = ("full", "counts", "counts-learnt", "counts-range")  # as RECIPE: other noise alone
TRIAL_STEPS = 120
TRIAL = (
    *(f"trainer.max_steps={TRIAL_STEPS}", f"trainer.val_check_interval={TRIAL_STEPS}"),
    *("trainer.log_every_n_steps=20", "trainer.limit_val_batches=1"),
    "lr_scheduler.num_warmup_steps=20",
)
NEAR = 0.05  # speeds that differ by less than this share are equal


def main(argv=None) -> int:
    args, more = parsed(options(), argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(shown(f"--out={args.out}: {reason(error)}"), file=sys.stderr)
        return 2
    try:
        asked = planned(args)
        if wrong := problems(asked, more):
            print("this study cannot start:", *map(shown, wrong), sep="\n", file=sys.stderr)
            return 2
        failed = carry_out(asked, args, more)
        if whole := lines([run for run in asked if run not in failed], args):
            report(whole, args.out)
    except (OSError, ValueError) as error:
        print(shown(reason(error)), file=sys.stderr)
        return 1
    for run in failed:
        print(shown(f"failed, not in the table: see {args.out / run.name}.log"), file=sys.stderr)
    return 1 if failed else 0


def options() -> argparse.ArgumentParser:
    known = [*VARIANTS, *BESIDE]

    def names(text: str) -> list[str]:
        return text.split(",")

    def variants(text: str) -> list[str]:
        for each in names(text):
            if each not in known:
                raise argparse.ArgumentTypeError(f"{each} is none of {', '.join(known)}")
        return names(text)

    def sizes(text: str) -> list[str]:
        for each in names(text):
            if each != WHOLE and not (each.isdecimal() and int(each)):
                raise argparse.ArgumentTypeError(
                    f"{each} is neither a number of tokens nor {WHOLE}"
                )
        return names(text)

    def seeds(text: str) -> list[int]:
        return [int(each) for each in names(text)]

    parser = new_parser(__doc__)
    parser.add_argument("--corpora", type=names, default=["shakespeare", "state_of_the_union"])
    parser.add_argument("--sizes", type=sizes, default=["4", "16", WHOLE], help="L: whole rows")
    parser.add_argument("--variants", type=variants, default=known, help=",".join(known))
    parser.add_argument("--seeds", type=seeds, default=[1, 2, 3])
    parser.add_argument("--steps", type=at_least(1), default=2500, help="of a run (%(default)s)")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="side by side (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/study"), help="(%(default)s)")
    return parser


def planned(args) -> list[Run]:
    """Seed by seed, so that all variants have runs early."""
    return [
        Run(corpus, sizes, variant, seed, args.steps)
        for seed in args.seeds
        for corpus in args.corpora
        for variant in args.variants
        for sizes in trainings(variant, args.sizes)
    ]


def problems(runs: Sequence[Run], more: Sequence[str]) -> list[str]:
    """What is wrong with the settings of these trainings, each line once. The seed and the corpus
    make no difference."""
    kinds = {(run.sizes, run.variant): run for run in reversed(runs)}.values()
    found = (line for run in kinds for line in settings.examine(run.words(more))[1])
    return [f"  - {line}" for line in dict.fromkeys(found)]


def carry_out(runs: list[Run], args, more: Sequence[str]) -> list[Run]:
    """Those that failed. Adds the runs of equal time to `runs`, once the speeds are known."""
    places = devices()
    trials = [run for run in trials_of(args) if speed(run, args.out) is None]
    if failed := side_by_side(
        trials, places, lambda run, place: try_out(run, args.out, more, place), "speed of "
    ):
        logs = ", ".join(f"{trial_folder(run, args.out)}.log" for run in failed)
        raise ValueError(f"the speed could not be measured: see {logs}")
    runs += timed_runs(runs, args)
    runs.sort(key=lambda run: run.seed)  # those of equal time too: one seed is a whole study
    todo = [run for run in runs if None in results(run, args.out).values()]
    say(f"{len(runs)} runs, {len(runs) - len(todo)} of them done")
    places = (places * args.jobs)[: args.jobs]
    return side_by_side(todo, places, lambda run, place: complete(run, args.out, more, place))


def complete(run: Run, out: Path, more: Sequence[str], place: str | None) -> bool:
    """Train and evaluate, but for what was done before."""
    folder = out / run.name
    if not called([*run.words(more), f"checkpointing.save_dir={folder}"], folder, place):
        return False
    last = (
        "mode=ppl_eval",
        "model.compile=false",  # it is short
        f"eval.checkpoint_path={folder / 'checkpoints' / 'last.ckpt'}",
    )
    for size, asked in run.evaluations().items():
        if evaluated(run, out, size) is None:
            save = f"checkpointing.save_dir={folder_at(run, out, size)}"
            if not called([*run.words(more, size), *last, *asked, save], folder, place):
                return False
    return True


def folder_at(run: Run, out: Path, size: str) -> Path:
    """Of an evaluation."""
    return out / run.name / f"evaluated-{size or 'beside'}"


def evaluated(run: Run, out: Path, size: str) -> float | None:
    """Nats per token; None: not yet."""
    found = sorted(folder_at(run, out, size).glob("ppl_*.json"))
    return read_json(found[-1])["nll"] if found else None


def results(run: Run, out: Path) -> dict[str, float | None]:
    """{block size: nats per token}"""
    return {size: evaluated(run, out, size) for size in run.evaluations()}


def trials_of(args) -> list[Run]:
    """A short run of each kind, whose speed counts. Below the whole row S does not change what is
    computed: one size tells of all."""
    sizes = [size for size in args.sizes if size == WHOLE or size == in_blocks(args)]
    return [
        Run(args.corpora[0], each, variant, args.seeds[0], args.steps)
        for variant in args.variants
        if variant not in (*SAME_STEP, *BESIDE)
        for each in trainings(variant, args.sizes if variant == SIZES else sizes)
    ]


def in_blocks(args) -> str | None:
    return next((size for size in args.sizes if size != WHOLE), None)


def trial_folder(run: Run, out: Path) -> Path:
    return out / "speed" / run.name


def try_out(run: Run, out: Path, more: Sequence[str], place: str | None) -> bool:
    folder = trial_folder(run, out)
    return called([*run.words(more), *TRIAL, f"checkpointing.save_dir={folder}"], folder, place)


def speed(trial: Run, out: Path) -> float | None:
    """Tokens per second, without the first steps, which compile. None: not measured yet."""
    log = trial_folder(trial, out) / "metrics.csv"
    rates = read_log(log).get("throughput/tokens_per_second", {}) if log.exists() else {}
    settled = [rate for step, rate in rates.items() if step > TRIAL_STEPS // 2]
    return statistics.median(settled) if TRIAL_STEPS in rates else None


def speeds(args) -> dict[tuple[str, tuple[str, ...]], float]:
    """{(variant, block sizes): tokens per second}, where it was measured."""
    found = {(run.variant, run.sizes): speed(run, args.out) for run in trials_of(args)}
    for variant in args.variants:
        for sizes in trainings(variant, args.sizes):
            if (alike := (variant, (in_blocks(args),))) in found and sizes != (WHOLE,):
                found.setdefault((variant, sizes), found[alike])
    return found


def timed_runs(runs: Sequence[Run], args) -> list[Run]:
    """For each run of another speed than the recipe one that takes its time."""
    rates, found = speeds(args), []
    for run in runs:
        own = rates.get((run.variant, run.sizes))
        of_recipe = [rates.get((RECIPE, (size,))) for size in run.sizes]
        if None not in (own, *of_recipe):
            ratio = own / statistics.harmonic_mean(of_recipe)
            if abs(ratio - 1) > NEAR:
                found.append(replace(run, steps=round(run.steps * ratio), timed=True))
    return found


def lines(runs: Sequence[Run], args) -> list[Line]:
    """The results of these runs, as they stand in runs.csv."""
    rates = speeds(args)
    return [
        Line(run.corpus, size, run.variant, run.seed, run.steps, run.timed, nats, rate)
        for run in runs
        for rate in [rates.get((run.variant, run.sizes))]
        for size, nats in results(run, args.out).items()
    ]


if __name__ == "__main__":
    sys.exit(main())
