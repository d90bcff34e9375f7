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

from .countdown import Countdown
from .draw import fold, sample
from .request import Sample
from .steps import DRAW, STEPS, Adaptive, Planned, RevealPlan, rank_in_group
from .texts import ActiveTexts

# (a hidden position, params) -> (start, stop): what is visible while it is filled
Span = Callable[[int, object], tuple[int, int]]


def generate_rounds(
    span: Span, denoise, requests, params, *, device, watch, tick
) -> Iterator[list[Sample]]:
    rows = ActiveTexts(denoise, requests, params, device, watch, tick)
    while len(rows):
        yield from_round(rows, span)


def from_round(rows: ActiveTexts, span: Span) -> list[Sample]:
    spans, fills = [], []
    for slot in rows.slots:
        first = slot.next_hidden()
        start, stop = span(slot.total - 1 if first is None else first, rows.params)
        spans.append((start, stop))
        fills.append(slot.hidden(start, stop))
    before = [min(slot.filled, slot.total) for slot in rows.slots]
    evaluations = rows.evaluations
    rule = STEPS[rows.params.steps]
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

    def __init__(self, rows: ActiveTexts, spans: list[tuple[int, int]]):
        self.rows = rows
        if rows.params.kv_cache:
            size = rows.params.block_size
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


def planned(rows: ActiveTexts, rule: Planned, spans, fills) -> None:
    """Everything about the round but the tokens is known beforehand: the device is never waited
    for."""
    row, position = listed(fills)
    plan = rule.plan(rows.keys(row, position), row, position, rows.params)
    for slot, evaluations in zip(rows.slots, plan.evaluations(len(rows)), strict=True):
        slot.nfe += evaluations
    view = View(rows, spans)
    for step in make_steps(rows, view, plan):
        if step.hide is not None:
            rows.x.scatter_(1, step.hide, rows.mask_id)
        view.reveal(step)
        rows.show()


def listed(fills: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Row and position of every hidden token, int64 [n]."""
    row = torch.arange(len(fills)).repeat_interleave(torch.tensor([len(fill) for fill in fills]))
    return row, torch.tensor([position for fill in fills for position in fill])


def make_steps(rows: ActiveTexts, view: View, plan: RevealPlan) -> list[Step]:
    """All evaluations of a round, brought to the device together.

    Rows with fewer positions than others read something and write it where it concerns nobody.
    """
    evaluations = int(plan.evaluation.max()) + 1
    starts = torch.tensor([view.starts, view.later])[plan.evaluation.clamp(max=1), plan.row]
    key = fold(rows.keys(plan.row, plan.position), plan.drawn + DRAW)
    given = torch.stack([plan.position - starts, plan.position, key])
    nobody = torch.tensor([[0], [rows.dump], [0]])
    numbers = tables(rows, given, nobody, plan.evaluation, plan.row, evaluations)
    if plan.hide is None:
        return [Step(part, None) for part in numbers]
    row, position, evaluation = plan.hide
    hidden = tables(rows, position[None], nobody[1:2], evaluation, row, evaluations)
    pairs = zip(numbers, hidden, strict=True)
    return [Step(part, hide[0] if hide.numel() else None) for part, hide in pairs]


def tables(rows: ActiveTexts, given, nobody, evaluation, row, evaluations: int) -> list[Tensor]:
    """given [k, n], a column of k numbers for each evaluation [n] and row [n], as one table [k, B,
    R] per evaluation, on the device. R is what its busiest row has; the others get `nobody` [k, 1]
    for the rest."""
    name = evaluation * len(rows) + row
    widths = name.bincount(minlength=evaluations * len(rows)).view(evaluations, -1).amax(1)
    sizes = widths * len(rows)
    name, order = name.sort(stable=True)
    evaluation, row = evaluation[order], row[order]
    at = (sizes.cumsum(0) - sizes)[evaluation] + row * widths[evaluation] + rank_in_group(name)
    laid = nobody.repeat(1, int(sizes.sum()))
    laid[:, at] = given[:, order]
    parts = rows.tensor(laid).split(sizes.tolist(), dim=1)
    shapes = [(len(rows), width) for width in widths.tolist()]
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def adaptive(rows: ActiveTexts, rule: Adaptive, spans, fills) -> None:
    """The network decides what is revealed, so all that was hidden at first is read each time.

    Of a rule that is not `sequential` the host learns late how many are left (countdown.py): a pass
    that turns out to ask nothing may follow the last one, and changes nothing.
    """
    params = rows.params
    view = View(rows, spans)
    row, position = listed(fills)
    twice = RevealPlan(
        row.repeat(2),
        position.repeat(2),
        torch.arange(2).repeat_interleave(len(row)),
        torch.zeros(2 * len(row), dtype=torch.int64),
    )
    first, later = make_steps(rows, view, twice)
    step = first  # of a cached round it starts a block earlier
    left = Countdown([len(fill) for fill in fills])
    while before := left.most():
        hidden = (rows.x.gather(1, step.write) == rows.mask_id) & (step.write != rows.dump)
        log_probs = view.ask(step.read)
        reveal = rule.choose(log_probs, hidden, params)
        if rule.sequential:
            left.tell([max(0, n - params.k) for n in left.known[-1]])
        else:
            left.send((hidden & ~reveal).sum(1))
        most = left.shown(before)
        if most == 0:
            break
        picked = reveal.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # [B, most]
        chosen = log_probs.gather(1, picked[..., None].expand(-1, -1, log_probs.shape[-1]))
        key = step.key.gather(1, picked)
        token = sample(chosen, key, params.nucleus_p, params.dtype)
        target = step.write.gather(1, picked).where(reveal.gather(1, picked), rows.dump)
        rows.x.scatter_(1, target, token)
        step = later
        rows.show()
    for slot, asked in zip(rows.slots, left.evaluations(), strict=True):
        slot.nfe += asked
