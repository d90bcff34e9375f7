"""Log-softmax, loss and gradient of a chunk of logits in one kernel for CUDA, where they lie.

A row is read once for its greatest value and its sum, and once more, while it still lies in the
cache, to be overwritten by its gradient.
"""

import torch
from torch import Tensor

from .starting import can_start

try:  # see decode.py
    import triton
    import triton.language as tl
except ImportError:
    triton = None

COLUMNS, WARPS = 2048, 16  # of a row at a time, chosen by measurement on an H200


def can_take(logits: Tensor) -> bool:
    """Whether `cross_entropy_in_place` can take logits [m, V]."""
    fits = logits.dtype.itemsize <= 4 and logits.stride(-1) == 1
    return fits and can_start(logits.device)


def cross_entropy_in_place(
    logits: Tensor, target: Tensor, gradient: bool, *, mask_id: int
) -> Tensor:
    """-log p(target), float32 [m], of logits [m, V] whose rows may lie apart; `gradient` overwrites
    them by its derivative, softmax - one-hot. The mask id has no chance (subs parameterization,
    arXiv:2406.07524)."""
    losses, target = logits.new_empty(len(logits), dtype=torch.float32), target.contiguous()
    if len(logits):
        with torch.cuda.device_of(logits):
            _cross_entropy[(len(logits),)](
                logits,
                logits.stride(0),
                target,
                losses,
                mask_id,
                VOCABULARY=logits.shape[1],
                GRADIENT=gradient,
                COLUMNS=COLUMNS,
                num_warps=WARPS,
            )
    return losses


if triton is not None:

    @triton.jit(do_not_specialize=["mask_id"])
    def _cross_entropy(
        logits,
        row_stride,
        target,
        losses,
        mask_id,
        VOCABULARY: tl.constexpr,
        GRADIENT: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row * row_stride
        wanted = tl.load(target + row)
        lane = tl.arange(0, COLUMNS)
        # each lane has its own greatest value and sum; they meet once, in the end
        most = tl.full([COLUMNS], -float("inf"), tl.float32)
        total = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, VOCABULARY, COLUMNS):
            column = start + lane
            x = tl.load(logits + column, mask=column < VOCABULARY, other=-float("inf"))
            x = tl.where(column == mask_id, -float("inf"), x.to(tl.float32))
            more = tl.maximum(most, x, propagate_nan=tl.PropagateNan.ALL)
            shift = tl.where(more == -float("inf"), 0, more)  # -inf - -inf is not a number
            total = total * tl.exp(most - shift) + tl.exp(x - shift)
            most = more
        best = tl.max(most, 0)
        shift = tl.where(most == -float("inf"), -float("inf"), most - best)
        norm = best + tl.log(tl.sum(total * tl.exp(shift), 0))
        chosen = tl.load(logits + wanted).to(tl.float32)
        chosen = tl.where(wanted == mask_id, -float("inf"), chosen)
        tl.store(losses + row, norm - chosen)
        if GRADIENT:
            tl.debug_barrier()  # all threads have read the target's logit, which one overwrites
            y = chosen - norm
            # exp(y) - 1, which is lost in float32 where the target is nearly certain
            less = tl.where(y > -0.01, y * (1 + y * (0.5 + y / 6)), tl.exp(y) - 1)
            for start in range(0, VOCABULARY, COLUMNS):
                column = start + lane
                inside = column < VOCABULARY
                x = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
                d = tl.where(column == mask_id, 0, tl.exp(x - norm))
                d = tl.where(column == wanted, less, d)
                tl.store(logits + column, d.to(logits.dtype.element_ty), mask=inside)
