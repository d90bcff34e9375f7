"""Which way of drawing noise trains the better likelihood: corpora, block sizes, variants, seeds.

    bash scripts/study.sh --jobs 4 [--sizes 4,16,L] [--variants clipped,counts] [--seeds 1,2,3]
        [--corpora shakespeare,state_of_the_union] [--out outputs/study] [-- OVERRIDES]

Every run trains for the same number of steps and is then evaluated on all held-out rows: by the
exact bound at S = 4, by `counts` with 8 draws at larger S. OUT gets a folder and a log for each
run, and study.csv, study.md and study.png. A difference is that to the published recipe (clipped)
with the same seed, on the same rows; its error is the standard error over seeds. Equal time: the
last validation within the training time of the fastest variant.
The same command goes on after an interruption. Words behind -- go to every main.py.
"""

import argparse
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modes.tables import csv_text, markdown, text
from scripts.support.command import new_parser, parsed
from scripts.support.picture import picture
from training.log_reading import read_log
from utils import atomic_file, read_json, reason, say, shown

ROOT = Path(__file__).resolve().parents[2]
BASE = (
    *("wandb=null", "lr_scheduler=cosine_decay_warmup", "lr_scheduler.num_warmup_steps=200"),
    *("data.insert_train_special=false", "data.insert_valid_special=false"),
    *("loader.global_batch_size=64", "loader.eval_global_batch_size=128", "loader.num_workers=1"),
    *("model.length=128", "model.hidden_size=256", "model.cond_dim=128", "model.n_blocks=6"),
    *("model.n_heads=8", "model.dropout=0.1", "optim.lr=1e-3", "training.ema=0.999"),
    *("trainer.max_steps=2500", "trainer.val_check_interval=250", "trainer.log_every_n_steps=50"),
    *("trainer.num_sanity_val_steps=0", "trainer.enable_progress_bar=false"),
    *("trainer.enable_model_summary=false", "trainer.devices=1", "model.attn_backend=sdpa"),
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=500",
)
RECIPE = "clipped"  # what the others are compared with
SEARCH = ("algo.var_min=true", "algo.clip_search_widths=[0.5,0.6,0.7,0.8,0.9]")
# name: its settings. A variant more is one line here.
VARIANTS = {
    "full": (),
    RECIPE: ("training.resample=true", *SEARCH),
    "counts": ("training.noise=counts",),
    "counts-learnt": ("training.noise=counts", "training.count_law=learnt"),
    "counts-range": ("training.noise=counts", *SEARCH),
}
WHOLE = "L"  # a block of the whole row: the objective of mdlm
BESIDE = {"ar": ("algo=ar", "block_size=1"), "sedd": ("algo=sedd",)}  # without blocks or variants
COLUMNS = (
    *("corpus", "S", "variant", "seeds", "nats", "error", "perplexity", "difference"),
    *("its error", "equal time", "its difference", "tokens/s"),
)


@dataclass(frozen=True)
class Run:
    corpus: str
    size: str  # "4", "16", WHOLE or "" beside
    variant: str
    seed: int

    @property
    def name(self) -> str:
        size = self.size and f"S{self.size}-"
        return f"{self.corpus}-{size}{self.variant}-seed{self.seed}"

    def words(self, more: Sequence[str]) -> list[str]:
        chosen = BESIDE.get(self.variant)
        if self.size:
            size = "${model.length}" if self.size == WHOLE else self.size
            chosen = ("algo=bamdlm", f"block_size={size}", *VARIANTS[self.variant])
        return [f"data={self.corpus}", *BASE, *chosen, f"seed={self.seed}", *more]

    def likelihood(self) -> list[str]:
        if not self.size:
            return []
        return ["eval.likelihood=exact"] if self.size == "4" else ["eval.draws=8"]


def main(argv=None) -> int:
    args, more = parsed(options(), argv)
    runs = planned(args)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        failed = carry_out(runs, args, more)
        if whole := [run for run in runs if run not in failed]:
            write(table(whole, args.out), args.out)
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

    def jobs(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{value} must be at least 1")
        return value

    parser = new_parser(__doc__)
    parser.add_argument("--corpora", type=names, default=["shakespeare", "state_of_the_union"])
    parser.add_argument("--sizes", type=sizes, default=["4", "16", WHOLE], help="L: whole rows")
    parser.add_argument("--variants", type=variants, default=known, help=",".join(known))
    parser.add_argument("--seeds", type=seeds, default=[1, 2, 3])
    parser.add_argument("--jobs", type=jobs, default=1, help="runs side by side (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/study"), help="(%(default)s)")
    return parser


def planned(args) -> list[Run]:
    """Seed by seed, so that all variants have runs early."""
    runs = []
    for seed in args.seeds:
        for corpus in args.corpora:
            for variant in args.variants:
                sizes = [""] if variant in BESIDE else args.sizes
                runs += [Run(corpus, size, variant, seed) for size in sizes]
    return runs


# ---- the runs -----------------------------------------------------------------------------------


def carry_out(runs: Sequence[Run], args, more: Sequence[str]) -> list[Run]:
    """Those that failed."""
    todo = [run for run in runs if result(args.out / run.name) is None]
    say(f"{len(runs)} runs, {len(runs) - len(todo)} of them done")
    failed, done, began, told = [], 0, time.monotonic(), threading.Lock()

    def work(run: Run) -> None:
        nonlocal done
        good = carry_out_one(run, args.out, more)
        with told:
            done += 1
            failed.extend([] if good else [run])
            left = (time.monotonic() - began) / done * (len(todo) - done)
            said = "done" if good else "failed"
            say(f"{run.name} {said}; {done} of {len(todo)}, about {left:,.0f} s left")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))
    return failed


def carry_out_one(run: Run, out: Path, more: Sequence[str]) -> bool:
    folder = out / run.name
    words = [*run.words(more), f"checkpointing.save_dir={folder}"]
    last = f"eval.checkpoint_path={folder / 'checkpoints' / 'last.ckpt'}"
    with (out / f"{run.name}.log").open("a") as log:
        for asked in ([], ["mode=ppl_eval", last, *run.likelihood()]):
            command = [sys.executable, str(ROOT / "main.py"), *words, *asked]
            if subprocess.run(command, stdout=log, stderr=log, check=False).returncode != 0:
                return False
    return True


def result(folder: Path) -> dict | None:
    found = sorted(folder.glob("ppl_*.json"))
    return read_json(found[-1]) if found else None


# ---- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """nats per token at the end and by validation; the seconds of training until each."""

    nll: float
    curve: dict[float, float]  # {seconds: nats per token}
    rate: float  # tokens per second

    def within(self, seconds: float) -> float:
        """The last validation until then; nan before the first."""
        seen = [nll for at, nll in self.curve.items() if at <= seconds * (1 + 1e-9)]
        return seen[-1] if seen else math.nan


def outcome(folder: Path) -> Outcome:
    log = read_log(folder / "metrics.csv")
    settings = read_json(folder / "settings.json")
    tokens = settings["loader.global_batch_size"] * settings["model.length"]
    seconds, at, before = 0.0, {}, 0
    for step, rate in sorted(log["throughput/tokens_per_second"].items()):
        seconds += (step - before) * tokens / rate
        at[step], before = seconds, step
    curve = {at[step]: nll for step, nll in sorted(log["val/nll"].items()) if step in at}
    return Outcome(result(folder)["nll"], curve, before * tokens / seconds)


def table(runs: Sequence[Run], out: Path) -> list[list[object]]:
    """A header and a line for each variant of a block size and a corpus."""
    found: dict[tuple[str, str], dict[str, dict[int, Outcome]]] = {}
    for run in runs:
        group = found.setdefault((run.corpus, run.size), {})
        group.setdefault(run.variant, {})[run.seed] = outcome(out / run.name)
    rows: list[list[object]] = [[*COLUMNS]]
    for (corpus, size), group in found.items():
        fastest = min(max(each.curve) for seeds in group.values() for each in seeds.values())
        for variant, seeds in group.items():
            rows.append([corpus, size or "-", variant, *line(seeds, group.get(RECIPE), fastest)])
    return rows


def line(seeds: dict[int, Outcome], recipe: dict[int, Outcome] | None, seconds: float) -> list:
    nats = [each.nll for each in seeds.values()]
    timed = {seed: each.within(seconds) for seed, each in seeds.items()}
    apart, apart_timed = [], []
    if recipe is not None and recipe is not seeds:
        both = sorted(seeds.keys() & recipe.keys())
        apart = [seeds[seed].nll - recipe[seed].nll for seed in both]
        apart_timed = [timed[seed] - recipe[seed].within(seconds) for seed in both]
    return [
        len(nats),
        *mean_and_error(nats),
        math.exp(statistics.fmean(nats)),
        *mean_and_error(apart),
        mean_and_error([*timed.values()])[0],
        mean_and_error(apart_timed)[0],
        statistics.fmean(each.rate for each in seeds.values()),
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The standard error over seeds, None for fewer than two. Both None where a value is not
    known."""
    if not values or any(map(math.isnan, values)):
        return None, None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def write(rows: list[list[object]], out: Path) -> None:
    read = [rows[0], *([digits(cell, i) for i, cell in enumerate(row)] for row in rows[1:])]
    print(text(read))
    for suffix, made in (("csv", csv_text(rows)), ("md", markdown(read) + "\n")):
        with atomic_file(out / f"study.{suffix}") as file:
            file.write(made)
    draw(rows, out / "study.png")
    say(f"written to {out}: study.csv, study.md and study.png")


def digits(cell: object, column: int) -> object:
    """Nats to three or four digits behind the point."""
    if not isinstance(cell, float) or COLUMNS[column] == "perplexity":
        return cell
    return f"{cell:,.0f}" if COLUMNS[column] == "tokens/s" else f"{cell:.4f}"


def draw(rows: list[list[object]], target: Path) -> None:
    """A panel for each corpus and block size: nats per token of each variant with its error."""
    panels: dict[str, list[dict]] = {}
    for row in rows[1:]:
        named = dict(zip(COLUMNS, row, strict=True))
        title = named["corpus"] + ("" if named["S"] == "-" else f", S = {named['S']}")
        panels.setdefault(title, []).append(named)
    tall = max(len(lines) for lines in panels.values())
    with picture(target, 4.2 * len(panels), 1 + 0.35 * tall, columns=len(panels)) as axes:
        for axis, (title, lines) in zip(
            [*getattr(axes, "flat", [axes])], panels.items(), strict=True
        ):
            for place, named in enumerate(lines):
                axis.errorbar(named["nats"], place, xerr=named["error"] or 0, fmt="o", capsize=3)
            axis.set_yticks(range(len(lines)), [named["variant"] for named in lines])
            axis.set_ylim(len(lines) - 0.5, -0.5)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("nats per token")
            axis.grid(True, axis="x", alpha=0.2)


if __name__ == "__main__":
    sys.exit(main())
