"""`-m`: several command lines in one, each in a process of its own, and one table at the end.

All of them are checked before the first starts. One that fails leaves the others as they are, and
the same command goes on with those that are not finished.
"""

import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from typing import get_origin

import settings
from modes import slurm
from modes.cli import examined
from modes.launching import Run, run_here
from modes.tables import filled, text
from settings import Config
from settings.keys import LEAVES, unwrap
from settings.multirun import Job, expand
from training.signals import BY_HAND, GO_ON
from utils import Failure, reason, say, shown, whole_number

MOST_NAMES = 3  # of jobs behind a problem


def main(argv: list[str]) -> int:
    """Exit code: 0 all is done, 1 some failed, 2 nothing was started; told to stop, stopped()."""
    multirun = expand(argv)
    problems = [*multirun.problems, *_surroundings(argv)]
    on_slurm = multirun.launcher == "submitit_slurm"
    if not problems:
        configs, problems = _checked(multirun.jobs)
        if any(config is not None and config.mode == "demo" for config in configs):
            problems.append("mode=demo serves a page until it is told to end: leave -m out")
        problems += [] if problems else _shared(multirun.jobs, configs)
    problems += slurm.problems(multirun) if on_slurm else []
    if problems:
        print(settings.ConfigError(problems), file=sys.stderr)
        return 2
    runs = [Run(job, config) for job, config in zip(multirun.jobs, configs, strict=True)]
    try:
        told = slurm.run(runs, multirun) if on_slurm else run_here(runs)
    except (Failure, OSError, MemoryError) as error:
        print(shown(reason(error)), file=sys.stderr)
        return 1
    say(table(runs))
    left = [str(number) for number, run in enumerate(runs, 1) if run.code != 0]
    if told is not None and left:
        return GO_ON if on_slurm and told != signal.SIGINT else stopped(told, runs)
    if left:
        print(f"{len(left)} of {len(runs)} jobs are not done: {', '.join(left)}", file=sys.stderr)
    return int(bool(left))


def stopped(told: signal.Signals, runs: list[Run]) -> int:
    """The exit code of what was told to stop: that of the last job, had it been alone. Where that
    has saved or is done, the others go on with the same command."""
    if told == signal.SIGINT:
        return BY_HAND
    last = ([run.code for run in runs if run.code is not None] or [GO_ON])[-1]
    if last < 0:  # training had not begun
        return 128 + told
    return GO_ON if last in (0, GO_ON) else 1


def _surroundings(argv: list[str]) -> Iterator[str]:
    """Why there cannot be several runs here."""
    if {"--cfg", "-c"} & set(argv):
        yield "--cfg shows one run: leave -m out, and give one value for each setting"
    tasks = whole_number(os.environ.get("SLURM_NTASKS")) or 1
    stepped = "SLURM_STEP_ID" in os.environ and tasks > 1
    if "TORCHELASTIC_RUN_ID" in os.environ or stepped:
        yield (
            f"-m under {'srun' if stepped else 'torchrun'} would start everything several times:"
            " run it alone, each run takes the processes that trainer.devices names"
        )


def _checked(jobs: list[Job]) -> tuple[list[Config | None], list[str]]:
    """The settings of all jobs, and each problem once, with the jobs that have it."""
    configs, found = [], defaultdict(list)
    for job in jobs:
        config, problems, _ = examined([*job.words])
        configs.append(config)
        for problem in problems:
            found[problem].append(job)
    return configs, [
        problem if len(those) == len(jobs) else f"{problem} (in {_named(those)})"
        for problem, those in found.items()
    ]


def _named(jobs: list[Job]) -> str:
    rest = len(jobs) - MOST_NAMES
    names = "; ".join(job.name for job in jobs[:MOST_NAMES])
    return f"{names}; {rest} more" if rest > 0 else names


def _shared(jobs: list[Job], configs: list[Config]) -> Iterator[str]:
    """Jobs that would write over each other's files."""
    writers = defaultdict(list)
    for job, config in zip(jobs, configs, strict=True):
        for place in _written(config):
            writers[place].append(job)
    for (setting, path, *_), those in writers.items():
        keys = [word.lstrip("+").partition("=")[0] for word in those[-1].swept]
        keys = [key if key in LEAVES else f"{key}.name" for key in keys]
        inside = "-".join(f"${{{key}}}" for key in keys if key in LEAVES) or "${seed}"
        key = keys[0] if len(keys) == 1 else None  # where it is a list, one run may have all
        together = ""
        if key in LEAVES and get_origin(unwrap(LEAVES[key].hint)[0]) is list:
            values = ",".join(word.partition("=")[2] for job in those for word in job.swept)
            together = f"; or leave -m out, and give {key}=[{values}]"
        if len(those) > 1:
            yield (
                f"{setting}={path} is the same in {_named(those)}, and they would write over each"
                f" other: put what differs into it, as in '{setting}={path}-{inside}'{together}"
            )


def _written(config: Config) -> Iterator[tuple]:
    """(setting, its value, what else decides the name) of files that a second run would write
    over. Texts are added to a file."""
    c, e = config.checkpointing, config.eval
    if config.mode == "train":
        yield "checkpointing.save_dir", c.save_dir
    if config.mode == "ppl_eval":
        named = e.checkpoint_path, e.disable_ema, config.data.valid
        yield "checkpointing.save_dir", c.save_dir, named
    if config.mode == "sample_eval" and config.sampling.trajectory is not None:
        yield "sampling.trajectory", config.sampling.trajectory


def table(runs: list[Run]) -> str:
    """What became of the jobs."""
    more = [*dict.fromkeys(name for run in runs for name in run.figures)]
    rows = [["job", "overrides", "Slurm", "exit code", "time", *more]]
    for index, run in enumerate(runs, 1):
        spent = None if run.seconds is None else str(timedelta(seconds=round(run.seconds)))
        values = [run.figures.get(name) for name in more]
        rows.append([index, run.job.name, run.job_id, run.outcome, spent, *values])
    return text(filled(rows))
