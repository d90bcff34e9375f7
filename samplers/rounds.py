"""Blocks and windows, round after round: the loop that bamdlm and mdlm share.

In one round every text of the batch gets one block (bamdlm) or one window (mdlm) filled. The step
rule says which positions each evaluation reveals (steps.py); a text that needs fewer evaluations
than its neighbours waits for the round to end. With a cache the finished block is committed by the
same pass that asks the first question about the next one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """What the network is fed: row b's tokens from starts[b] on."""

    def __init__(self, rows: Rows, spans: list[tuple[int, int]]):
        self.rows, self.spans = rows, spans
        self.first = True
        if rows.settings.kv_cache:
            size = rows.settings.block_size
            blocks = [stop - size for _, stop in spans]
            rows.catch_up([block - size for block in blocks], spare=2 * size)
            self.starts = [slot.committed for slot in rows.slots]
            self.pending = [block - start for block, start in zip(blocks, self.starts, strict=True)]
            self.width = size + max(self.pending)
        else:
            self.starts = [start for start, _ in spans]
            self.width = max(stop - start for start, stop in spans)

    def ask(self, read: Tensor) -> Tensor:
        """log-probabilities at read [B, R], positions in the view."""
        answer = self.rows.ask(self.rows.window(self.starts, self.width), read, self.rows.cache)
        if self.rows.settings.kv_cache and self.first:
            if any(self.pending):
                self.rows.commit(self.pending)
            self.starts = [slot.committed for slot in self.rows.slots]
            self.width = self.rows.settings.block_size
        self.first = False
        return answer


@dataclass(frozen=True)
class Step:
    """One evaluation of the batch, all [B, R]: where to read in the view, where to write, with
    which number.
    """

    read: Tensor
    write: Tensor
    key: Tensor
    hide: Tensor | None  # [B, R']: positions masked beforehand


def planned(rows: Rows, rule: Planned, spans, fills) -> None:
    """Everything about the round but the tokens is known beforehand: the device is never waited
    for.
    """
    slots = [i for i, fill in enumerate(fills) for _ in fill]
    keys = rows.keys(slots, [position for fill in fills for position in fill])
    plans = rule.plan(keys, fills, rows.settings)
    for slot, plan in zip(rows.slots, plans, strict=True):
        slot.nfe += len(plan)
    view = View(rows, spans)
    for number in range(max(map(len, plans))):
        events = [plan[number] if number < len(plan) else Event([]) for plan in plans]
        step = make_step(rows, view.starts, events)
        if step.hide is not None:
            rows.x.scatter_(1, step.hide, rows.mask_id)
        log_probs = view.ask(step.read)
        token = sample(log_probs, step.key, rows.settings.nucleus_p, rows.settings.dtype)
        rows.x.scatter_(1, step.write, token)
        rows.show()


def make_step(rows: Rows, starts: list[int], events: list[Event]) -> Step:
    """Rows with fewer positions than others read something and write it where it concerns
    nobody.
    """
    width = max(len(event.reveal) for event in events)
    nobody = [(rows.dump, 0)]
    padded = [event.reveal + nobody * (width - len(event.reveal)) for event in events]
    slots = [i for i in range(len(padded)) for _ in range(width)]
    positions = [position for row in padded for position, _ in row]
    drawn = torch.tensor([count for row in padded for _, count in row])
    read = [0 if p == rows.dump else p - starts[i] for i, p in zip(slots, positions, strict=True)]
    key = fold(rows.keys(slots, positions), drawn + DRAW)
    packed = torch.stack([torch.tensor(read), torch.tensor(positions), key]).view(
        3, len(events), width
    )
    packed = rows.tensor(packed)
    hide = None
    if any(event.hide for event in events):
        most = max(len(event.hide) for event in events)
        hide = rows.tensor(
            [event.hide + [rows.dump] * (most - len(event.hide)) for event in events]
        )
    return Step(packed[0], packed[1], packed[2], hide)


def adaptive(rows: Rows, rule: Adaptive, spans, fills) -> None:
    """The network decides what is revealed, so all that was hidden at first is read each time.

    Only a rule that is not `sequential` has to wait for the device, once per evaluation.
    """
    settings = rows.settings
    view = View(rows, spans)
    events = [Event([(p, 0) for p in fill]) for fill in fills]
    steps = {}
    left = [len(fill) for fill in fills]
    while any(left):
        for slot, n in zip(rows.slots, left, strict=True):
            slot.nfe += n > 0
        origin = tuple(view.starts)
        if origin not in steps:  # the first pass of a cached round starts a block earlier
            steps[origin] = make_step(rows, view.starts, events)
        step = steps[origin]
        hidden = (rows.x.gather(1, step.write) == rows.mask_id) & (step.write != rows.dump)
        log_probs = view.ask(step.read)
        reveal = rule.choose(log_probs, hidden, settings)
        if rule.sequential:
            most, left = settings.k, [max(0, n - settings.k) for n in left]
        else:
            shown, left = torch.stack([reveal.sum(1), (hidden & ~reveal).sum(1)]).tolist()
            most = max(shown)
        picked = reveal.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # [B, most]
        chosen = log_probs.gather(1, picked[..., None].expand(-1, -1, log_probs.shape[-1]))
        key = step.key.gather(1, picked)
        token = sample(chosen, key, settings.nucleus_p, settings.dtype)
        target = step.write.gather(1, picked).where(reveal.gather(1, picked), rows.dump)
        rows.x.scatter_(1, target, token)
        rows.show()
