"""Blocks and windows, round after round: the loop that bamdlm and mdlm share.

The step rule says which positions each evaluation reveals (steps.py); a text that needs fewer
evaluations than its neighbours waits for the round to end. With a cache the finished block is
committed by the same pass that is the first evaluation of the next one.

A corrector, where one is asked for, masks the tokens of the finished block that were least probable
when they were drawn, and the same rule fills them once more; what was given is left as it is.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .canvas import Canvas
from .draw import fold
from .params import SamplingParams
from .sending import Countdown, to_device
from .steps import DRAW, STEPS, Adaptive, Chance, Planned, RevealPlan, rank_in_group
from .texts import ActiveTexts

# (a masked position, params) -> (start, stop): what is visible while it is filled
Span = Callable[[int, SamplingParams], tuple[int, int]]


def block_span(position: int, params: SamplingParams) -> tuple[int, int]:
    """BAM-DLM: blocks from left to right, each filled given the clean blocks before it
    (arXiv:2503.09573).

    A block sees itself and the tokens before it, `context_size` in all. Infilling fills the gaps of
    a block given what is to its left and its own visible tokens.
    """
    stop = (position // params.block_size + 1) * params.block_size
    return max(0, stop - params.context_size), stop


def window_span(position: int, params: SamplingParams) -> tuple[int, int]:
    """MDLM: a window is filled whole, then moves by half its length, given what it still sees
    (arXiv:2406.07524). The last is moved less where that is enough for the length asked for.
    """
    width = min(params.window, params.length)
    stride = max(1, width // 2)
    moves = max(0, -(-(position + 1 - width) // stride))
    stop = min(moves * stride + width, params.length)
    return stop - width, stop


def one_round(texts: ActiveTexts, span: Span) -> int:
    """One block or window of each text."""
    spans, fills = [], []
    for slot in texts.slots:
        first = slot.next_masked()
        start, stop = span(slot.total - 1 if first is None else first, texts.params)
        spans.append((start, stop))
        fills.append(slot.masked(start, stop))
    fill(texts, spans, fills)
    if texts.params.corrector and any(fills):
        fill(texts, spans, mask_again(texts, fills), again=True)
    for slot, (_, stop) in zip(texts.slots, spans, strict=True):
        slot.filled = stop
    return sum(map(len, fills))


def fill(texts: ActiveTexts, spans, fills: list[list[int]], again: bool = False) -> None:
    """Write the masked positions fills[b] of each row, given what is in its span."""
    rule = STEPS[texts.params.steps]
    if any(fills):
        (planned if isinstance(rule, Planned) else adaptive)(texts, rule, spans, fills, again)


def mask_again(texts: ActiveTexts, fills: list[list[int]]) -> list[list[int]]:
    """Mask the `corrector` positions of fills[b] (all, where there are fewer) whose tokens had the
    least probability when they were drawn, of equal ones the first. Returns them. Waits for the
    device."""
    canvas = texts.canvas
    row, position = listed(fills)
    places = torch.full((len(fills), max(map(len, fills))), canvas.dump)
    places[row, rank_in_group(row)] = position
    places = to_device(places, canvas.device)
    sure = canvas.sure.gather(1, places).masked_fill(places == canvas.dump, torch.inf)
    least = sure.argsort(dim=1, stable=True)[:, : texts.params.corrector]
    places = places.gather(1, least)
    canvas.x.scatter_(1, places, canvas.mask_id)
    return [sorted(set(found) - {canvas.dump}) for found in places.tolist()]


class View:
    """What the network is fed: row b's tokens from starts[b] on. `later`: from the second
    evaluation on, when the finished block is in the cache.

    Where the network answers at the token before (adapt.label=next), the last one before the block
    is fed each time, and is committed with the block."""

    def __init__(self, texts: ActiveTexts, spans: list[tuple[int, int]]):
        self.texts = texts
        if texts.params.kv_cache:
            size, canvas = texts.params.block_size, texts.canvas
            again = int(canvas.shifted)
            blocks = [stop - size for _, stop in spans]
            held = zip(blocks, canvas.committed, strict=True)
            canvas.catch_up([b - size if b - size > c + again else c for b, c in held], 2 * size)
            self.later = [max(b - again, 0) for b in blocks]
            self.starts = canvas.committed
            self.pending = [b - start for b, start in zip(self.later, self.starts, strict=True)]
            before = max(b - start for b, start in zip(blocks, self.starts, strict=True))
            self.width, self.later_width = size + before, size + again
        else:
            self.starts = self.later = [start for start, _ in spans]
            self.pending = []
            self.width = self.later_width = max(stop - start for start, stop in spans)

    def reveal(self, step: Tensor) -> None:
        """Draw what is read and write it; step: see make_steps."""
        self.texts.canvas.reveal(self.starts, self.width, step)
        self._asked()

    def choose(self, rule: Adaptive, most: int | None, step: Tensor, number: Tensor) -> Tensor:
        """Reveal what the rule chooses, see `choose`."""
        canvas = self.texts.canvas
        function = partial(choose, canvas, rule, most)
        left = canvas.evaluate(("choose", most), function, self.starts, self.width, step, number)
        self._asked()
        return left

    def _asked(self) -> None:
        if any(self.pending):
            self.texts.canvas.commit(self.pending)
            self.pending = []
        self.starts, self.width = self.later, self.later_width


def planned(texts: ActiveTexts, rule: Planned, spans, fills, again: bool) -> None:
    """All of the round but the tokens is known beforehand: the device is never waited for."""
    row, position = listed(fills)
    plan = rule.plan(texts.keys(row, position, again), row, position, texts.params)
    plan.check_ends(row, len(texts))
    for slot, evaluations in zip(texts.slots, plan.evaluations(len(texts)), strict=True):
        slot.nfe += evaluations
    view = View(texts, spans)
    keys = fold(texts.keys(plan.row, plan.position, again), plan.drawn + DRAW)
    for step, masked in make_steps(texts, view, plan, keys):
        if masked is not None:
            texts.canvas.x.scatter_(1, masked, texts.canvas.mask_id)
        view.reveal(step)
        texts.show()


def listed(fills: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Row and position of every masked token, int64 [n]."""
    row = torch.arange(len(fills)).repeat_interleave(torch.tensor([len(fill) for fill in fills]))
    return row, torch.tensor([position for fill in fills for position in fill])


def make_steps(
    texts: ActiveTexts, view: View, plan: RevealPlan, keys: Tensor
) -> list[tuple[Tensor, Tensor | None]]:
    """All evaluations of a round, brought to the device together: (step, again) for each. keys: of
    the entries of the plan, int64 [n].

    step int64 [3, B, R]: where to read in the view, where to write, with which key. again [B, R']:
    positions to mask beforehand. Rows with fewer positions than others read something and write it
    where it concerns nobody.
    """
    evaluations = int(plan.evaluation.max()) + 1
    starts = torch.tensor([view.starts, view.later])[plan.evaluation.clamp(max=1), plan.row]
    given = torch.stack([plan.position - starts, plan.position, keys])
    nobody = torch.tensor([[0], [texts.canvas.dump], [0]])
    numbers = laid_out(texts, given, nobody, plan.evaluation, plan.row, evaluations)
    if plan.again is None:
        return [(part, None) for part in numbers]
    row, position, evaluation = plan.again
    masked = laid_out(texts, position[None], nobody[1:2], evaluation, row, evaluations)
    pairs = zip(numbers, masked, strict=True)
    return [(part, again[0] if again.numel() else None) for part, again in pairs]


def laid_out(texts: ActiveTexts, given, nobody, evaluation, row, evaluations: int) -> list[Tensor]:
    """given [k, n], a column of k numbers for each evaluation [n] and row [n], as one table [k, B,
    R] per evaluation, on the device. R is what its busiest row has; the others get `nobody` [k, 1]
    for the rest."""
    name = evaluation * len(texts) + row
    widths = name.bincount(minlength=evaluations * len(texts)).view(evaluations, -1).amax(1)
    sizes = widths * len(texts)
    name, order = name.sort(stable=True)
    evaluation, row = evaluation[order], row[order]
    at = (sizes.cumsum(0) - sizes)[evaluation] + row * widths[evaluation] + rank_in_group(name)
    laid = nobody.repeat(1, int(sizes.sum()))
    laid[:, at] = given[:, order]
    parts = to_device(laid, texts.canvas.device).split(sizes.tolist(), dim=1)
    shapes = [(len(texts), width) for width in widths.tolist()]
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def whole_steps(texts: ActiveTexts, view: View, fills, again: bool) -> tuple[Tensor, Tensor]:
    """Steps that read all of fills: the first of a round, which with a cache starts a block
    earlier, and every later one."""
    row, position = listed(fills)
    twice = RevealPlan(
        row.repeat(2),
        position.repeat(2),
        torch.arange(2).repeat_interleave(len(row)),
        torch.zeros(2 * len(row), dtype=torch.int64),
    )
    keys = texts.keys(twice.row, twice.position, again)
    (first, _), (later, _) = make_steps(texts, view, twice, keys)
    return first, later


def adaptive(texts: ActiveTexts, rule: Adaptive, spans, fills, again: bool) -> None:
    """The network decides what is revealed, so all that was masked at first is read each time.

    Of a rule that is not `sequential` the host learns late how many are left (Countdown): a pass
    that turns out to ask nothing may follow the last one, and changes nothing.
    """
    view = View(texts, spans)
    step, later = whole_steps(texts, view, fills, again)
    left = Countdown([len(fill) for fill in fills])
    each = texts.params.k if "k" in rule.reads else 1  # revealed in a step, where it is sequential
    places = step.shape[-1]
    numbers = iter(torch.arange(places, device=step.device))  # each shows one at least
    while bound := left.most():
        most = None  # a CPU counts what is revealed
        if step.device.type != "cpu":  # rounded up, as each value is recorded apart
            most = min(each if rule.sequential else 1 << (bound - 1).bit_length(), places)
        remaining = view.choose(rule, most, step, next(numbers))
        if rule.sequential:
            remaining = torch.tensor([max(0, n - each) for n in left.known[-1]])
        left.send(remaining)
        step = later
        texts.show()
    for slot, asked in zip(texts.slots, left.evaluations(), strict=True):
        slot.nfe += asked


def choose(
    canvas: Canvas, rule: Adaptive, most: int | None, tokens: Tensor, cache, step: Tensor, number
) -> Tensor:
    """Ask the network about tokens [B, T], reveal what the rule chooses in evaluation `number` of
    the block, and return how many of each row are masked still, int64 [B]. step: see make_steps.
    most: no row has more revealed; None: to be counted."""
    read, write, keys = step
    masked = (canvas.x.gather(1, write) == canvas.mask_id) & (write != canvas.dump)
    log_probs = canvas.answer(tokens, read, cache)
    chance = Chance(log_probs, keys, number, canvas.params)
    reveal = rule.choose(log_probs, masked, canvas.params, chance)
    if most is None:
        most = int(reveal.sum(1).max())
    picked = reveal.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # [B, most]
    target = write.gather(1, picked).where(reveal.gather(1, picked), canvas.dump)
    canvas.write(target, chance.drawn(picked), log_probs, picked)
    return (masked & ~reveal).sum(1)
