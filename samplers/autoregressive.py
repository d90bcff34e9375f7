"""AR: one token at a time, each from the distribution that the token before it asks for."""

import torch

from .draw import fold
from .sending import to_device
from .steps import DRAW
from .texts import ActiveTexts

ROUND_TOKENS = 32  # between two looks at the stop rules, which have to wait for the device


def one_round(texts: ActiveTexts) -> int:
    for slot in texts.slots:
        slot.filled = slot.looked = max(slot.filled, slot.given)
        if slot.gaps:
            raise ValueError(
                f"row {slot.request.row}: the prompt has mask tokens at {slot.gaps[:3]};"
                " algo=ar cannot fill gaps, use mdlm or bamdlm"
            )
    count = min([ROUND_TOKENS] + [slot.total - slot.filled for slot in texts.slots])
    for _ in range(count):
        next_token(texts)
    return len(texts) * count


def next_token(texts: ActiveTexts) -> None:
    params, canvas = texts.params, texts.canvas
    targets = [slot.filled for slot in texts.slots]
    target = torch.tensor(targets)
    if params.kv_cache:
        canvas.catch_up([target - 1 for target in targets], spare=2)
        starts = canvas.committed
    else:
        starts = [max(0, target - params.context_size) for target in targets]
    feed = [target - start for target, start in zip(targets, starts, strict=True)]
    key = fold(texts.keys(torch.arange(len(texts)), target), DRAW)
    step = torch.stack([torch.tensor(feed) - 1, target, key])
    canvas.reveal(starts, max(feed), to_device(step, canvas.device)[..., None])
    if params.kv_cache:
        canvas.commit(feed)
    for slot in texts.slots:
        slot.filled += 1
        slot.nfe += 1
    texts.show()
