"""Texts of mode=demo while they are written: what is asked for, how far it is, and the HTML of it.

Nothing of a prompt, a tokenizer or a model gets into the HTML but as text.
"""

import html
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from samplers.params import SamplingParams
from samplers.request import Frame, Sample, TextRequest
from samplers.writing import generate
from sampling.notebook import Writer
from sampling.view import FRESH, MASKED, SETTLED
from settings.limits import Limit, unfit
from utils import escaped, harmless, reason, shown

log = logging.getLogger(__name__)

GAP = "[MASK]"
GIVEN = "given"
MOST_CHARACTERS = 1 << 16  # of a prompt
LOOKS = 10  # a second, at the texts being written
FORSAKEN = 10  # seconds without a look, after which nobody waits for the text any more
BOX = "░"


class Stopped(Exception):
    """Somebody does not want the rest of a text."""


@dataclass(frozen=True)
class Control:
    """A setting on the page. `rules`: the step rules that read it, None: every text does."""

    key: str  # of the command line
    field: str  # of SamplingParams
    default: object
    about: str  # a sentence or more
    whole: bool = False  # a whole number; else any number, or a text where there are `names`
    names: tuple[str, ...] = ()
    rules: tuple[str, ...] | None = None
    limit: Limit | None = None

    def read(self, value: object) -> object:
        """What the page sent, as SamplingParams takes it. ValueError: one sentence."""
        wrong = f"{self.key}={'' if value is None else value} must be"
        if self.names:
            if value not in self.names:
                raise ValueError(f"{wrong} one of {', '.join(self.names)}")
            return value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or (self.whole and value != int(value)):
            raise ValueError(f"{wrong} {'a whole number' if self.whole else 'a number'}")
        value = int(value) if self.whole else float(value)
        if end := unfit(value):
            raise ValueError(f"{self.key}={value} {end}")
        if self.limit is not None and not self.limit.holds(value):
            raise ValueError(f"{wrong} {self.limit.words}")
        return value


def read(controls: Sequence[Control], values: Sequence[object]) -> dict:
    """{field: value} of one side of the page, without what its step rule does not read.
    ValueError with a sentence for each value that cannot be."""
    given = dict(zip(controls, values, strict=True))
    rule = next((value for control, value in given.items() if control.field == "steps"), None)
    found, problems = {}, []
    for control, value in given.items():
        if control.rules is None or rule in control.rules:
            try:
                found[control.field] = control.read(value)
            except ValueError as problem:
                problems.append(str(problem))
    if problems:
        raise ValueError("; ".join(problems))
    return found


@dataclass(frozen=True)
class Progress:
    """How far a text is: one entry for each of its tokens."""

    tokens: Sequence[int]
    chances: Sequence[float | None]  # of the tokens when they were drawn; None: not known
    evaluations: Sequence[int]  # in which they were drawn, from 1; 0: they were given
    nfe: int = 0
    seconds: float = 0.0

    def after(self, frame: Frame, seconds: float) -> "Progress":
        """With what an evaluation of this text alone has changed."""
        length = len(self.tokens)
        before, tokens = (x[0, :length].tolist() for x in (frame.before, frame.tokens))
        found = frame.log_probs[0, :length].exp().tolist()
        chances, evaluations = list(self.chances), list(self.evaluations)
        for i, (old, new) in enumerate(zip(before, tokens, strict=True)):
            if old != new:
                chances[i] = None if math.isnan(found[i]) else found[i]
                evaluations[i] = frame.nfe
        return Progress(tokens, chances, evaluations, frame.nfe, seconds)


@dataclass
class Text:
    """One text that is asked for, and its progress. ValueError where it cannot be written."""

    writer: Writer
    prompt: str
    changes: dict  # of the writer's params
    sample: Sample | None = None  # when it is done
    problem: str | None = None
    params: SamplingParams = field(init=False)
    request: TextRequest = field(init=False)
    progress: Progress = field(init=False)

    def __post_init__(self):
        if (length := len(self.prompt)) > MOST_CHARACTERS:
            raise ValueError(
                f"the prompt has {length:,} characters, more than {MOST_CHARACTERS:,}: shorten it"
            )
        self.params = self.writer.params.changed(batch_size=1, **self.changes)
        infill = GAP in self.prompt
        (ids,) = self.writer.encode([self.prompt], self.params, infill)
        total = len(ids) if infill else self.params.length
        self.request = TextRequest(0, ids, total=total if infill else None)
        tokens = [*ids, *[self.writer.tokenizer.mask_id] * (total - len(ids))]
        self.progress = Progress(tokens, [None] * total, [0] * total)

    @property
    def ended(self) -> bool:
        return self.sample is not None or self.problem is not None

    def write(self, job: "Job") -> None:
        """From the first evaluation to the last; only while the turn of the job is held."""
        seconds = 0.0

        def watch(frame: Frame) -> None:
            nonlocal seconds, begun
            seconds += time.perf_counter() - begun
            self.progress = self.progress.after(frame, seconds)
            job.rest()
            begun = time.perf_counter()

        with job.turn:
            begun = time.perf_counter()
            try:
                groups = generate(
                    self.writer.writes,
                    self.writer.denoise,
                    [self.request],
                    self.params,
                    device=self.writer.device,
                    watch=watch,
                )
                ((self.sample,),) = (group for group in groups if group)
            except Stopped:
                self.problem = "stopped"
            except Exception as error:
                log.exception("a text could not be written")
                self.problem = shown(reason(error))


class Job:
    """Texts that are written side by side, an evaluation of each in turn, so that the time of each
    is its own. `pause`: seconds after an evaluation, to look at it; they are not counted."""

    def __init__(self, texts: Sequence[Text], pause: float = 0.0):
        self.texts, self.pause = texts, pause
        self.turn, self.stop = threading.Lock(), threading.Event()
        self.looked = time.monotonic()

    def rest(self) -> None:
        """Between two evaluations: let the others go on. Stopped: nobody wants the rest."""
        self.turn.release()
        stopped = self.stop.wait(self.pause)
        self.turn.acquire()
        if stopped or time.monotonic() - self.looked > FORSAKEN:
            raise Stopped

    def run(self) -> Iterator[None]:
        """Writes the texts in threads; yields some times a second, and when all have ended."""
        threads = [
            # a Ctrl-C waits for no text
            threading.Thread(target=text.write, args=(self,), daemon=True)
            for text in self.texts
        ]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                self.looked = time.monotonic()
                yield
                next_look = time.monotonic() + 1 / LOOKS
                for thread in threads:
                    thread.join(max(0.0, next_look - time.monotonic()))
            yield
        finally:
            self.stop.set()


def piece_reader(tokenizer):
    """token -> its part of a text, the space before it included where the tokenizer puts one
    between words. A character that consists of several tokens shows as so many unknown ones."""
    first = tokenizer.bos_id
    ahead = tokenizer.decode([first])

    @cache
    def piece(token: int) -> str:
        both = tokenizer.decode([first, token])
        return both.removeprefix(ahead) if both.startswith(ahead) else tokenizer.decode([token])

    return piece


def plain(text: str) -> str:
    """Any text as HTML that shows it: no markup, and no characters that hide or turn others."""
    return html.escape(harmless(text))


def text_html(progress: Progress, mask_id: int, piece, seen: int | None) -> str:
    """Each token as a <span> of its state, with its token, probability and evaluation as title.
    seen: the evaluations that were shown before; later tokens are fresh. None: nothing is."""
    parts = zip(progress.tokens, progress.chances, progress.evaluations, strict=True)
    spans = []
    for token, chance, evaluation in parts:
        if token == mask_id:
            spans.append(f'<span class="{MASKED}" title="masked">{BOX}</span>')
            continue
        word = piece(token)
        said = f"evaluation {evaluation}" if evaluation else GIVEN
        if evaluation and chance is not None:
            said = f"probability {chance:.3f}, {said}"
        fresh = seen is not None and evaluation > seen
        state = FRESH if fresh else SETTLED if evaluation else GIVEN
        title = html.escape(f"{escaped(repr(word))}, {said}")
        spans.append(f'<span class="{state}" title="{title}">{plain(word)}</span>')
    return f'<div class="text">{"".join(spans)}</div>'


def figures(text: Text) -> str:
    """Evaluations, seconds and speed so far, in words."""
    progress, mask_id = text.progress, text.writer.tokenizer.mask_id
    given = sum(token != mask_id for token in text.request.tokens)
    made = sum(token != mask_id for token in progress.tokens) - given
    nfe = progress.nfe if text.sample is None else text.sample.nfe
    rate = f"{made / progress.seconds:,.0f}" if progress.seconds else "–"
    return (
        f"NFE {nfe:,} · {made:,} tokens written · {made / max(nfe, 1):.2f} tokens per evaluation"
        f" · {rate} tokens/s · {progress.seconds:.2f} s"
    )


def side_html(text: Text, piece, seen: int | None) -> str:
    """A text, its figures and, where it ended early, why."""
    words = text_html(text.progress, text.writer.tokenizer.mask_id, piece, seen)
    found = f'{words}<p class="figures">{plain(figures(text))}</p>'
    if text.problem is not None:
        return refused_html(text.problem, found)
    return f'<div class="side {"done" if text.ended else "writing"}">{found}</div>'


def refused_html(problem: str, rest: str = "") -> str:
    """Why there is no text, or not all of it. rest: HTML."""
    said = plain(shown(problem))
    return f'<div class="side problem">{rest}<p class="problem" role="alert">{said}</p></div>'
