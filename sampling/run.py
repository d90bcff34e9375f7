"""The sample_eval run: texts, their figures, one CSV row each (spec §6), a report.

Row r of a run is text number r: what is written depends on (seed, r) and the settings, so rows are
shared out over processes by r, and an interrupted run is completed by the same command.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from data.tokenizer import Tokenizer
from evaluation.judge import Judge, describe
from evaluation.quality import diversity
from objectives.algorithms import get_algorithm
from samplers.params import SamplingParams
from samplers.request import Sample, TextRequest
from samplers.writing import SAMPLERS, check, generate
from sampling.prompts import encode_prompts
from sampling.report import RULES, lines, made_with, summarise
from sampling.sample_file import SampleFile, SampleRow
from sampling.view import Progress, Show, Trajectory
from utils import digest, say


def run_id(*parts: object) -> str:
    """Name of a run: a hash of whatever decides its texts (checkpoint, settings, seed, prompts)."""
    return digest(json.dumps(parts, sort_keys=True, default=str), 12)


def visible_tokens(algo: str, params: SamplingParams) -> int:
    """Most tokens of a prompt: those that the first evaluation can see. mdlm's windows move."""
    looks_back = "cache" in SAMPLERS[get_algorithm(algo).writes].can
    return params.context_size if looks_back else params.length


@dataclass(frozen=True)
class Model:
    """What writes: a denoiser with its tokenizer, and how it is asked."""

    algo: str
    denoise: Callable  # see samplers/writing.py
    tokenizer: Tokenizer
    params: SamplingParams
    device: object = "cpu"

    @property
    def writes(self) -> str:
        """A name of SAMPLERS."""
        return get_algorithm(self.algo).writes

    def encode(
        self, prompts: Sequence[str], params: SamplingParams, infill: bool
    ) -> list[tuple[int, ...]]:
        """Ids of prompts, BOS first. ValueError where a sampler with these params cannot go on with
        them."""
        check(params, self.writes, infill)
        return encode_prompts(
            prompts,
            self.tokenizer,
            infill=infill,
            length=params.length,
            context_size=visible_tokens(self.algo, params),
        )


@dataclass(frozen=True)
class Texts:
    """What to write: texts number 0 .. count - 1."""

    count: int
    # ids, BOS first; text r has prompt r modulo their number
    prompts: Sequence[tuple[int, ...]] = ()
    infill: bool = False  # fill the gaps of the prompts

    def prompt_number(self, row: int) -> int | None:
        """Which of the prompts text `row` has, from 0; None without prompts."""
        return row % len(self.prompts) if self.prompts else None

    def request(self, row: int, bos_id: int) -> TextRequest:
        """What the sampler is given for text `row`; without prompts BOS alone."""
        number = self.prompt_number(row)
        if number is None:
            return TextRequest(row, (bos_id,))
        tokens = self.prompts[number]
        return TextRequest(row, tokens, total=len(tokens) if self.infill else None)


@dataclass(frozen=True)
class Output:
    """Where the texts go, and what is shown of them on the way."""

    file: SampleFile
    run: str  # name of the run, see run_id
    show: bool = False  # in the terminal, as they are denoised
    trajectory: str | None = None  # a page that replays the first of them
    about: dict = field(default_factory=dict)  # more for the report: checkpoint, precision …


@dataclass(frozen=True)
class SamplingRun:
    """A sampling run that was checked; `run()` does what is missing of it."""

    model: Model
    texts: Texts
    output: Output
    judge: Judge | None = None
    rank: int = 0
    ranks: int = 1

    def __post_init__(self):
        check(self.model.params, self.model.writes, self.texts.infill)
        if (count := self.texts.count) < 1:
            raise ValueError(f"sampling.num_sample_batches leaves {count} texts to write")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank {self.rank} is not one of {self.ranks} processes")

    def missing(self) -> list[int]:
        """Rows of this process that are not in the file."""
        done = self.output.file.numbers(self.output.run)
        return [r for r in range(self.rank, self.texts.count, self.ranks) if r not in done]

    def run(self) -> dict | None:
        """complete(), and the report is printed."""
        tell_cache([self])
        summary, file = self.complete(), self.output.file
        if summary is not None:
            for line in lines(summary):
                print(line, flush=True)
            print(f"texts: {file.path}; report: {file.summary}", flush=True)
        return summary

    def complete(self) -> dict | None:
        """Write the missing texts. Returns the report, or None where rows of the run miss."""
        file, run = self.output.file, self.output.run
        count = self.texts.count
        if missing := self.missing():
            self._write(missing)
        else:
            say(f"{file.path} has all {count} texts of this run: nothing to do")
            if self.output.show or self.output.trajectory is not None:
                say(
                    "nothing is shown or recorded: choose another sampling.logdir or seed to write"
                    " new texts"
                )
        found = file.rows(run)
        rows = [found[number] for number in range(count) if number in found]
        if len(rows) < count:
            return None  # another process is still writing; the last one reports
        # in the tokens of the model, whoever judges them
        ids = self.model.tokenizer.encode_batch([row.samples for row in rows])
        ngrams = diversity(ids, self.model.params.eos_id)
        facts = {name: figure.value for name, figure in ngrams.items()} | self.report_facts()
        summary = summarise(rows, file.notes(run), facts)
        file.report(run, summary)
        return summary

    def cache_bytes(self) -> int:
        """Memory of the cache, known before the run: a ring of context + one block per text."""
        params, denoise = self.model.params, self.model.denoise
        if not params.kv_cache:
            return 0
        size = denoise.block_size
        texts = min(params.batch_size, self.texts.count)
        return denoise.new_cache(1, size).bytes // (2 * size) * (params.context_size + size) * texts

    def _write(self, missing: list[int]) -> None:
        """From prompts to rows of the file: generate, judge, add."""
        model, params = self.model, self.model.params
        started, process = time.monotonic(), f"{os.getpid()}-{time.time_ns()}"
        with ExitStack() as stack:
            shown = self.rank == 0 and not self.output.show
            progress = stack.enter_context(Progress(len(missing), enabled=shown))
            watchers = [stack.enter_context(view) for view in self._views(missing)]
            requests = (self.texts.request(row, params.bos_id) for row in missing)
            groups = generate(
                model.writes,
                model.denoise,
                requests,
                params,
                device=model.device,
                watch=(lambda frame: [w(frame) for w in watchers]) if watchers else None,
                tick=progress.tick,
            )
            for samples in groups:
                size = self.judge.batch_size if self.judge else len(samples)
                for first in range(0, len(samples), max(1, size)):
                    part = samples[first : first + size]
                    rows = self._rows(part)
                    seconds = time.monotonic() - started
                    note = {"process": process, "rank": self.rank, "seconds": seconds}
                    self.output.file.add(rows, note | totals(part))
                    progress.tick(texts=len(rows))

    def _views(self, missing: list[int]) -> Iterator[Show | Trajectory]:
        output, tokenizer = self.output, self.model.tokenizer
        if output.show and self.rank == 0:
            yield Show(tokenizer)
        if output.trajectory is not None and self.rank == 0:
            yield Trajectory(
                output.trajectory, tokenizer, row=missing[0], about=self.report_facts()
            )

    def _rows(self, samples: list[Sample]) -> list[SampleRow]:
        """One row of the file for each sample, with the figures of its text."""
        params = self.model.params
        texts = [self.model.tokenizer.decode(s.tokens.tolist()) for s in samples]
        if self.judge is None:
            scores = [describe(s.tokens, params.eos_id) for s in samples]
        else:
            scores = self.judge.score(texts)
        return [
            SampleRow(
                gen_ppl=None if self.judge is None else score.perplexity,
                gen_nfes=sample.nfe,
                gen_entropy=score.entropy,
                gen_lengths=score.tokens,
                samples=text,
                seed=params.seed,
                row=sample.row,
                run=self.output.run,
                made=self.made(sample.row),
            )
            for sample, text, score in zip(samples, texts, scores, strict=True)
        ]

    def made(self, row: int) -> dict:
        """How the text of this row was made, as the CSV has it."""
        return {
            "algo": self.model.algo,
            "checkpoint": self.output.about.get("checkpoint"),
            "prompt": self.texts.prompt_number(row),
            **made_with(self.model.algo, self.model.params),
        }

    def report_facts(self) -> dict:
        """The settings that decide the texts, as the report has them."""
        algo, params = self.model.algo, self.model.params
        read = {name: x for name, x in made_with(algo, params).items() if x is not None}
        return {
            "algo": algo,
            "run": self.output.run,
            "seed": params.seed,
            **read,
            "nucleus": RULES["nucleus"] if params.nucleus_p < 1 else "none",
            "prompts": len(self.texts.prompts),
            "infill": self.texts.infill,
            "ranks": self.ranks,
            **self.output.about,
        }


def tell_cache(runs: Sequence[SamplingRun]) -> None:
    """The memory of the largest cache of those that still write."""
    largest = max((x for x in runs if x.missing()), key=SamplingRun.cache_bytes, default=None)
    if largest is not None and largest.model.params.kv_cache:
        params = largest.model.params
        say(
            f"the cache takes {largest.cache_bytes() / 2**20:,.1f} MiB for {params.batch_size}"
            f" texts of {params.context_size} visible tokens"
        )


def totals(samples: Sequence[Sample]) -> dict:
    """What the columns of the file cannot hold of these samples, summed over them."""
    return {
        "rows": len(samples),
        "tokens": sum(s.written for s in samples),
        "nfes": sum(s.nfe for s in samples),
        "tries": sum(s.tries for s in samples),
        "rejected": sum(s.rejected for s in samples),
        "stopped": Counter(s.stopped for s in samples),
    }
