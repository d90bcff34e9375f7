"""AR: one token at a time, each from the distribution that the token before it asks for."""

from collections.abc import Iterator

import torch

from .draw import fold
from .request import Sample
from .steps import DRAW
from .texts import ActiveTexts

ROUND_TOKENS = 32  # between two looks at the stop rules, which have to wait for the device


def generate_autoregressive(
    denoise, requests, params, *, device, watch, tick
) -> Iterator[list[Sample]]:
    rows = ActiveTexts(denoise, requests, params, device, watch, tick)
    while len(rows):
        yield one_round(rows)


def one_round(rows: ActiveTexts) -> list[Sample]:
    for slot in rows.slots:
        slot.filled = max(slot.filled, slot.given)
        if slot.gaps:
            raise ValueError(
                f"row {slot.request.row}: the prompt has mask tokens at {slot.gaps[:3]};"
                " algo=ar cannot fill gaps, use mdlm or bamdlm"
            )
    before = [slot.filled for slot in rows.slots]
    count = min([ROUND_TOKENS] + [slot.total - slot.filled for slot in rows.slots])
    for _ in range(count):
        next_token(rows)
    if rows.tick is not None:
        rows.tick(len(rows) * count, count)
    return rows.settle(before, every=True)


def next_token(rows: ActiveTexts) -> None:
    params = rows.params
    targets = [slot.filled for slot in rows.slots]
    target = torch.tensor(targets)
    if params.kv_cache:
        rows.catch_up([target - 1 for target in targets], spare=2)
        starts = [slot.committed for slot in rows.slots]
    else:
        starts = [max(0, target - params.context_size) for target in targets]
    feed = [target - start for target, start in zip(targets, starts, strict=True)]
    key = fold(rows.keys(torch.arange(len(rows)), target), DRAW)
    step = torch.stack([torch.tensor(feed) - 1, target, key])
    rows.reveal(starts, max(feed), rows.tensor(step)[..., None])
    if params.kv_cache:
        rows.commit(feed)
    for slot in rows.slots:
        slot.filled += 1
        slot.nfe += 1
    rows.show()
