"""Looking at sampling: a progress bar, the text as it is denoised, a page that replays it."""

import html
import json
import sys
import time
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from string import Template

from rich import progress
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from samplers.request import Frame
from utils import harmless, say, write_text

PAGE = Path(__file__).with_name("page.html")
LINE_SECONDS = 15  # between lines in a log file
SHOWN_TOKENS = 600  # of a text in the terminal
SHOWN_ROWS = 3
MASKED, FRESH, SETTLED = "masked", "fresh", "settled"
STYLES = {MASKED: "dim", FRESH: "bold black on yellow", SETTLED: ""}


class Progress(progress.Progress):
    """Tokens written, tokens/s, evaluations: a bar in a terminal, lines in a log file."""

    def __init__(self, texts: int, *, enabled: bool):
        super().__init__(
            progress.SpinnerColumn(),
            progress.TextColumn("texts"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeElapsedColumn(),
            disable=not (enabled and sys.stdout.isatty()),
        )
        self.texts, self.lines = texts, enabled and self.disable
        self.written = self.tokens = self.evaluations = 0
        self.begun = self.shown = time.monotonic()
        self.task = self.add_task("", total=texts, figures="")

    def tick(self, tokens: int = 0, evaluations: int = 0, texts: int = 0) -> None:
        """So many more."""
        self.tokens += tokens
        self.evaluations += evaluations
        self.written += texts
        now = time.monotonic()
        rate = self.tokens / max(now - self.begun, 1e-9)
        figures = f"{self.tokens:,} tokens, {rate:,.0f} tokens/s, {self.evaluations:,} evaluations"
        self.update(self.task, completed=self.written, figures=figures)
        if self.lines and now - self.shown > LINE_SECONDS:
            self.shown = now
            say(f"{self.written} of {self.texts} texts, {figures}")


def pieces(
    tokens: list[int], before: list[int] | None, mask_id: int
) -> list[tuple[str, list[int]]]:
    """Runs of (state, ids): masked, fresh since `before`, settled."""
    states = [
        MASKED if token == mask_id else SETTLED if token == old else FRESH
        for token, old in zip(tokens, before or tokens, strict=True)
    ]
    pairs = groupby(zip(states, tokens, strict=True), key=itemgetter(0))
    return [(state, [token for _, token in group]) for state, group in pairs]


class Show(Live):
    """The first texts of the batch in the terminal: masked, fresh and settled tokens."""

    def __init__(self, tokenizer, console: Console | None = None):
        super().__init__(console=console, refresh_per_second=12, vertical_overflow="ellipsis")
        self.tokenizer = tokenizer
        self.before: dict[int, list[int]] = {}

    def __call__(self, frame: Frame) -> None:
        text, now = Text(), {}
        for row, tokens in zip(frame.rows[:SHOWN_ROWS], frame.tokens[:SHOWN_ROWS], strict=True):
            now[row] = tokens.tolist()
            text.append(f"text {row}, evaluation {frame.nfe}\n", style="bold cyan")
            text.append(self.paint(now[row], self.before.get(row))).append("\n\n")
        self.before = now
        self.update(text)

    def paint(self, tokens: list[int], before: list[int] | None) -> Text:
        """The part of a text that is being written."""
        mask = self.tokenizer.mask_id
        written = [i for i, token in enumerate(tokens) if token != mask]
        stop = min(len(tokens), (written[-1] if written else 0) + 1 + SHOWN_TOKENS // 10)
        start = max(0, stop - SHOWN_TOKENS)
        before = None if before is None else before[start:stop]
        text = Text()
        for state, ids in pieces(tokens[start:stop], before, mask):
            # tokens may hold what would change the terminal
            shown = "░" * len(ids) if state == MASKED else harmless(self.tokenizer.decode(ids))
            text.append(shown, style=STYLES[state])
        return text


class Trajectory:
    """Records one text and writes a page that replays it; the page needs nothing but a browser."""

    def __init__(self, path: str | Path, tokenizer, *, row: int, about: dict):
        self.path, self.tokenizer = Path(path), tokenizer
        self.row, self.about = row, about
        self.given: list[list] = []  # [position, piece] that were there before the first evaluation
        self.last: list[int] | None = None
        self.steps: list[list[list]] = []  # per evaluation: [position, piece or None for masked]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.last is not None:
            self.write()
            say(f"text {self.row} replays in {self.path}")

    def __call__(self, frame: Frame) -> None:
        if self.row in frame.rows:
            place = frame.rows.index(self.row)
            self.record(frame.before[place], frame.tokens[place])

    def record(self, before: Tensor, tokens: Tensor) -> None:
        now = tokens.tolist()
        mask = self.tokenizer.mask_id
        if self.last is None:
            self.last = before.tolist()
            self.given = [[i, self.piece(t)] for i, t in enumerate(self.last) if t != mask]
        changed = [i for i, (a, b) in enumerate(zip(self.last, now, strict=True)) if a != b]
        self.steps.append([[i, None if now[i] == mask else self.piece(now[i])] for i in changed])
        self.last = now

    def piece(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def write(self) -> None:
        used = 1 + max((i for step in [self.given, *self.steps] for i, _ in step), default=0)
        data = json.dumps({"length": used, "given": self.given, "steps": self.steps})
        about = self.about.items()
        facts = ", ".join(f"{k} {v}" for k, v in about if v not in (None, False, "none"))
        page = Template(PAGE.read_text(encoding="utf-8")).substitute(
            title=html.escape(f"text {self.row}"),
            facts=html.escape(facts),
            data=data.replace("<", "\\u003c"),
        )
        write_text(self.path, page)
