"""Blocks and windows, round after round: the loop that bamdlm and mdlm share.

In one round every text of the batch gets one block (bamdlm) or one window (mdlm) filled. The step
rule says which positions each evaluation reveals (steps.py); a text that needs fewer evaluations
than its neighbours waits for the round to end. With a cache the finished block is committed by the
same pass that asks the first question about the next one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from .countdown import Countdown
from .draw import fold, sample
from .rows import Rows
from .settings import Sample
from .steps import DRAW, STEPS, Adaptive, Event, Planned

# (a hidden position, settings) -> (start, stop): what is visible while it is filled
Span = Callable[[int, object], tuple[int, int]]


def generate_rounds(
    span: Span, denoise, requests, settings, *, device, watch, tick
) -> Iterator[list[Sample]]:
    rows = Rows(denoise, requests, settings, device, watch, tick)
    while len(rows):
        yield from_round(rows, span)


def from_round(rows: Rows, span: Span) -> list[Sample]:
    spans, fills = [], []
    for slot in rows.slots:
        first = slot.next_hidden()
        start, stop = span(slot.total - 1 if first is None else first, rows.settings)
        spans.append((start, stop))
        fills.append(slot.hidden(start, stop))
    before = [min(slot.filled, slot.total) for slot in rows.slots]
    evaluations = rows.evaluations
    rule = STEPS[rows.settings.steps]
    if any(fills):
        (planned if isinstance(rule, Planned) else adaptive)(rows, rule, spans, fills)
    for slot, (_, stop) in zip(rows.slots, spans, strict=True):
        slot.filled = stop
    if rows.tick is not None:
        rows.tick(sum(map(len, fills)), rows.evaluations - evaluations)
    return rows.settle(before)


class View:
    """What the network is fed: row b's tokens from starts[b] on. `later`: from the second
    evaluation on, when the finished block is in the cache."""

    def __init__(self, rows: Rows, spans: list[tuple[int, int]]):
        self.rows = rows
        if rows.settings.kv_cache:
            size = rows.settings.block_size
            self.later = [stop - size for _, stop in spans]
            rows.catch_up([block - size for block in self.later], spare=2 * size)
            self.starts = [slot.committed for slot in rows.slots]
            self.pending = [b - start for b, start in zip(self.later, self.starts, strict=True)]
            self.width, self.later_width = size + max(self.pending), size
        else:
            self.starts = self.later = [start for start, _ in spans]
            self.pending = []
            self.width = self.later_width = max(stop - start for start, stop in spans)

    def ask(self, read: Tensor) -> Tensor:
        """log-probabilities at read [B, R], positions in the view."""
        rows = self.rows
        answer = rows.ask(rows.window(self.starts, self.width), read, rows.cache)
        self._asked()
        return answer

    def reveal(self, step: "Step") -> None:
        """Draw what is read and write it."""
        self.rows.reveal(self.starts, self.width, step.numbers)
        self._asked()

    def _asked(self) -> None:
        if any(self.pending):
            self.rows.commit(self.pending)
            self.pending = []
        self.starts, self.width = self.later, self.later_width


@dataclass(frozen=True)
class Step:
    """One evaluation of the batch."""

    numbers: Tensor  # int64 [3, B, R]: where to read in the view, where to write, with which key
    hide: Tensor | None  # [B, R']: positions masked beforehand

    @property
    def read(self) -> Tensor:
        return self.numbers[0]

    @property
    def write(self) -> Tensor:
        return self.numbers[1]

    @property
    def key(self) -> Tensor:
        return self.numbers[2]


def planned(rows: Rows, rule: Planned, spans, fills) -> None:
    """Everything about the round but the tokens is known beforehand: the device is never waited
    for."""
    slots = [i for i, fill in enumerate(fills) for _ in fill]
    keys = rows.keys(slots, [position for fill in fills for position in fill])
    plans = rule.plan(keys, fills, rows.settings)
    for slot, plan in zip(rows.slots, plans, strict=True):
        slot.nfe += len(plan)
    view = View(rows, spans)
    evaluations = zip_longest(*plans, fillvalue=Event([]))
    for step in make_steps(rows, view, list(evaluations)):
        if step.hide is not None:
            rows.x.scatter_(1, step.hide, rows.mask_id)
        view.reveal(step)
        rows.show()


def make_steps(rows: Rows, view: View, evaluations: list[Sequence[Event]]) -> list[Step]:
    """All evaluations of a round, one event per row each, brought to the device together.

    Rows with fewer positions than others read something and write it where it concerns nobody.
    """
    slots, positions, drawn, read, sizes = [], [], [], [], []
    starts = view.starts
    for events in evaluations:
        width = max(len(event.reveal) for event in events)
        for i, event in enumerate(events):
            for position, count in event.reveal:
                positions.append(position)
                drawn.append(count)
                read.append(position - starts[i])
            nobody = width - len(event.reveal)
            positions += [rows.dump] * nobody
            drawn += [0] * nobody
            read += [0] * nobody
            slots += [i] * width
        sizes.append(width * len(events))
        starts = view.later
    key = fold(rows.keys(slots, positions), torch.tensor(drawn) + DRAW)
    packed = rows.tensor(torch.stack([torch.tensor(read), torch.tensor(positions), key]))
    parts = [part.unflatten(1, (len(rows), -1)) for part in packed.split(sizes, dim=1)]
    return [
        Step(part, hidden_again(rows, events))
        for part, events in zip(parts, evaluations, strict=True)
    ]


def hidden_again(rows: Rows, events: Sequence[Event]) -> Tensor | None:
    most = max(len(event.hide) for event in events)
    if most == 0:
        return None
    return rows.tensor([event.hide + [rows.dump] * (most - len(event.hide)) for event in events])


def adaptive(rows: Rows, rule: Adaptive, spans, fills) -> None:
    """The network decides what is revealed, so all that was hidden at first is read each time.

    Of a rule that is not `sequential` the host learns late how many are left (countdown.py): a pass
    that turns out to ask nothing may follow the last one, and changes nothing.
    """
    settings = rows.settings
    view = View(rows, spans)
    events = [Event([(p, 0) for p in fill]) for fill in fills]
    first, later = make_steps(rows, view, [events, events])
    step = first  # of a cached round it starts a block earlier
    left = Countdown([len(fill) for fill in fills])
    while before := left.most():
        hidden = (rows.x.gather(1, step.write) == rows.mask_id) & (step.write != rows.dump)
        log_probs = view.ask(step.read)
        reveal = rule.choose(log_probs, hidden, settings)
        if rule.sequential:
            left.tell([max(0, n - settings.k) for n in left.known[-1]])
        else:
            left.send((hidden & ~reveal).sum(1))
        most = left.shown(before)
        if most == 0:
            break
        picked = reveal.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # [B, most]
        chosen = log_probs.gather(1, picked[..., None].expand(-1, -1, log_probs.shape[-1]))
        key = step.key.gather(1, picked)
        token = sample(chosen, key, settings.nucleus_p, settings.dtype)
        target = step.write.gather(1, picked).where(reveal.gather(1, picked), rows.dump)
        rows.x.scatter_(1, target, token)
        step = later
        rows.show()
    for slot, asked in zip(rows.slots, left.evaluations(), strict=True):
        slot.nfe += asked
