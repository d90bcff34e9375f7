"""The sample_eval run: texts, their figures, one CSV row each (spec §6), a report.

Plain arguments only. Row r of a run is text number r: what is written depends on (seed, r) and the
settings, so rows are shared out over processes by r, and an interrupted run is completed by the
same command.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from evaluation.judge import Judge, TextScore, describe
from samplers.params import BLOCKWISE, SamplingParams
from samplers.request import Sample, TextRequest
from samplers.writing import check, generate
from sampling.report import RULES, lines, rule_numbers, summarise, write_summary
from sampling.sample_file import SampleFile, SampleRow
from sampling.view import Progress, Show, Trajectory
from utils import say


def run_id(*parts: object) -> str:
    """Name of a run: a hash of whatever decides its texts (checkpoint, settings, seed, prompts)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def visible_tokens(algo: str, params: SamplingParams) -> int:
    """Most tokens of a prompt: those that the first evaluation can see. mdlm's windows move."""
    return params.context_size if algo in ("bamdlm", "ar") else params.length


@dataclass(frozen=True)
class SamplingRun:
    """A sampling run that was checked; `run()` does what is missing of it."""

    algo: str
    denoise: Callable
    tokenizer: object  # decode, bos_id, eos_id, mask_id
    params: SamplingParams
    num_samples: int
    file: SampleFile
    run_name: str
    prompts: Sequence[
        tuple[int, ...]
    ] = ()  # ids, BOS first; row r has prompt r modulo their number
    infill: bool = False
    judge: Judge | None = None
    device: object = "cpu"
    rank: int = 0
    ranks: int = 1
    about: dict | None = None  # more for the report: checkpoint, precision …
    show: bool = False
    trajectory: str | None = None

    def __post_init__(self):
        check(self.params, self.algo, self.infill)
        if self.num_samples < 1:
            raise ValueError(
                f"sampling.num_sample_batches leaves {self.num_samples} texts to write"
            )
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank {self.rank} is not one of {self.ranks} processes")
        self.file.check()

    def request(self, row: int) -> TextRequest:
        if not self.prompts:
            return TextRequest(row, (self.params.bos_id,))
        tokens = self.prompts[row % len(self.prompts)]
        return TextRequest(row, tokens, total=len(tokens) if self.infill else None)

    def missing(self) -> list[int]:
        """Rows of this process that are not in the file."""
        done = self.file.rows(self.run_name)
        return [r for r in range(self.rank, self.num_samples, self.ranks) if r not in done]

    def run(self) -> dict | None:
        """Write the missing texts. Returns the report if all rows of the run are there, else
        None.
        """
        missing = self.missing()
        if missing:
            self._write(missing)
        else:
            say(f"{self.file.path} has all {self.num_samples} texts of this run: nothing to do")
            if self.show or self.trajectory is not None:
                say("nothing is shown or recorded either: name another sampling.logdir or seed")
        return self._report()

    def cache_bytes(self) -> int:
        """Memory of the cache, known before the run: a ring of context + one block per text."""
        if not self.params.kv_cache:
            return 0
        size = self.denoise.block_size
        slots = self.params.context_size + size
        texts = min(self.params.batch_size, self.num_samples)
        return self.denoise.new_cache(1, size).bytes // (2 * size) * slots * texts

    def _write(self, missing: list[int]) -> None:
        if self.params.kv_cache:
            say(
                f"cache: {self.cache_bytes() / 2**20:,.1f} MiB for {self.params.batch_size} texts"
                f" of {self.params.context_size} visible tokens"
            )
        started, process = time.monotonic(), f"{os.getpid()}-{time.time_ns()}"
        with ExitStack() as stack:
            shown = self.rank == 0 and not self.show
            progress = stack.enter_context(Progress(len(missing), self.params, enabled=shown))
            watchers = [stack.enter_context(view) for view in self._views(missing)]
            groups = generate(
                self.algo,
                self.denoise,
                map(self.request, missing),
                self.params,
                device=self.device,
                watch=(lambda frame: [w(frame) for w in watchers]) if watchers else None,
                tick=progress.tick,
            )
            for samples in groups:
                if not samples:
                    continue
                for rows, part in self._scored(samples):
                    note = {
                        "process": process,
                        "rank": self.rank,
                        "seconds": time.monotonic() - started,
                        "rows": len(rows),
                        "tokens": sum(s.written for s in part),
                        "nfes": sum(s.nfe for s in part),
                        "tries": sum(s.tries for s in part),
                        "rejected": sum(s.rejected for s in part),
                        "stopped": Counter(s.stopped for s in part),
                    }
                    self.file.add(rows, note)
                    progress.done(len(rows))

    def _views(self, missing: list[int]) -> Iterator:
        if self.show and self.rank == 0:
            yield Show(self.tokenizer)
        if self.trajectory is not None and self.rank == 0:
            yield Trajectory(
                self.trajectory, self.tokenizer, row=missing[0], about=self.report_facts()
            )

    def _scored(self, samples: list[Sample]) -> Iterator[tuple[list[SampleRow], list[Sample]]]:
        """Rows as soon as they are judged, in groups of the judge's batch."""
        size = self.judge.batch_size if self.judge else len(samples)
        for first in range(0, len(samples), size):
            part = samples[first : first + size]
            texts = [self.tokenizer.decode(s.tokens.tolist()) for s in part]
            if self.judge is None:
                scores = [describe(s.tokens, self.params.eos_id) for s in part]
            else:
                scores = self.judge.score(texts)
            yield [self._row(*found) for found in zip(part, texts, scores, strict=True)], part

    def _row(self, sample: Sample, text: str, score: TextScore) -> SampleRow:
        return SampleRow(
            gen_ppl=None if self.judge is None else score.perplexity,
            gen_nfes=sample.nfe,
            gen_entropy=score.entropy,
            gen_lengths=score.tokens,
            samples=text,
            seed=self.params.seed,
            row=sample.row,
            run=self.run_name,
        )

    def report_facts(self) -> dict:
        s = self.params
        steps = s.steps if self.algo in BLOCKWISE else self.algo
        return {
            "algo": self.algo,
            "run": self.run_name,
            "seed": s.seed,
            "length": s.length,
            "block_size": s.block_size if self.algo == "bamdlm" else None,
            "window": s.window if self.algo == "mdlm" else None,
            "context_size": s.context_size if self.algo in ("bamdlm", "ar") else None,
            "steps": steps,
            **{name: getattr(s, name) for name in rule_numbers(steps)},
            "T": s.num_steps,
            "nucleus_p": s.nucleus_p,
            "nucleus": RULES["nucleus"] if s.nucleus_p < 1 else "none",
            "dtype": s.dtype,
            "kv_cache": s.kv_cache,
            "var_length": s.var_length,
            "reject_low_entropy": s.reject_low_entropy,
            "prompts": len(self.prompts),
            "infill": self.infill,
            "ranks": self.ranks,
            **(self.about or {}),
        }

    def _report(self) -> dict | None:
        rows = self.file.rows(self.run_name)
        rows = [rows[r] for r in range(self.num_samples) if r in rows]
        if len(rows) < self.num_samples:
            return None  # another process is still writing; the last one reports
        summary = summarise(rows, self.file.notes(self.run_name), self.report_facts())
        path = write_summary(self.file, summary)
        for line in lines(summary):
            print(line, flush=True)
        print(f"texts: {self.file.path}; report: {path}", flush=True)
        return summary
