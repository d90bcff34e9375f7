"""The last linear layer and a loss on top of it, one chunk of logits at a time.

The gradient with respect to the logits is known as soon as a chunk's logits are, because every
token's factor in the scalar loss is known beforehand. So the forward pass multiplies it out at once
and keeps [M, E] and [V, E], never [M, V], and the backward pass only scales. Of a frozen head
[V, E] is not made.

Without gradients a loss needs two numbers of a row of logits. On a CPU these are added up tile by
tile, so that logits never leave its cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.compiling import compiled, compiling
from models.kernels.cross_entropy import can_take, cross_entropy_in_place
from models.layers import wide_dtype
from models.network import CPU_COLUMNS, products, products_dtype, widened

CHUNK_LOGITS = 1 << 24  # logits held at once: 64 MiB in float32
CHUNK_LOGITS_ACCELERATOR = 1 << 28  # small matrices leave a GPU idle
EVEN_ROWS = 64
TILE_ROWS = 1024  # times CPU_COLUMNS are 4 MiB in float32: they stay in a cache


@dataclass(frozen=True)
class LossKernel:
    """A loss on the logits of a row, in two forms."""

    # (logits [m, V] in the dtype of the products, targets [m], gradient, ...) -> losses float32
    # [m]; overwrites the logits, with `gradient` by d losses / d logits
    of_logits: Callable[..., Tensor]
    of_sums: Callable[..., Tensor]  # (RowSums, ...) -> losses [m]
    mask_id: int  # of the token that has no chance


@dataclass(frozen=True)
class RowSums:
    """Of rows of logits, float32 [m] at least."""

    norm: Tensor  # log of the sum of exp(logit) over all tokens but the mask
    picked: Tensor  # the target's logit


@dataclass(frozen=True)
class HeadLoss:
    losses: Tensor  # float32 [M], without a graph
    total: Tensor  # sum of factor * losses, with a graph


def cross_entropy(logits: Tensor, target: Tensor, gradient: bool, *, mask_id: int) -> Tensor:
    """-log p(target) with the mask id excluded (subs parameterization, arXiv:2406.07524)."""
    logits[:, mask_id] = -torch.inf
    wide = wide_dtype(logits)
    in_place = logits if logits.dtype == wide else None  # one pass, no second [m, V]
    log_p = torch.log_softmax(logits, -1, dtype=wide, out=in_place)
    picked = log_p.gather(1, target[:, None])
    if gradient:
        torch.exp(log_p, out=logits)
        logits.scatter_(1, target[:, None], picked.expm1().to(logits.dtype))
    return -picked[:, 0]


def cross_entropy_kernel(backbone, mask_id: int) -> LossKernel:
    """`cross_entropy`, in one kernel where there is one, else compiled where the network is."""
    without = fused_cross_entropy if backbone.compiled else cross_entropy

    def of_logits(logits: Tensor, target: Tensor, gradient: bool) -> Tensor:
        chosen = cross_entropy_in_place if can_take(logits) else without
        return chosen(logits, target, gradient, mask_id=mask_id)

    return LossKernel(of_logits, lambda sums: sums.norm - sums.picked, mask_id)


def fused_cross_entropy(logits: Tensor, target: Tensor, gradient: bool, *, mask_id: int) -> Tensor:
    """`cross_entropy` in two passes over the logits, by torch.compile."""
    for x in (logits, target):  # the last chunk and the next step must not compile anew
        torch._dynamo.maybe_mark_dynamic(x, 0)
    with compiling():
        return compiled(_cross_entropy_in_place)(logits, target, gradient, mask_id)


def _cross_entropy_in_place(logits: Tensor, target: Tensor, gradient: bool, mask_id: int) -> Tensor:
    column = torch.arange(logits.shape[1], device=logits.device)
    wide = logits.to(wide_dtype(logits)).masked_fill(column == mask_id, -torch.inf)
    norm = wide.logsumexp(-1, keepdim=True)
    is_target = column == target[:, None]
    losses = norm[:, 0] - wide.masked_fill(~is_target, 0).sum(-1)
    if gradient:
        log_p = wide - norm
        logits.copy_(torch.where(is_target, log_p.expm1(), log_p.exp()))
    return losses


def head_loss(
    backbone,
    hidden: Tensor,
    targets: Tensor,
    factors: Tensor,
    kernel: LossKernel,
    *kernel_rows: Tensor,
    sigma: Tensor | None = None,
    row: Tensor | None = None,
) -> HeadLoss:
    """`kernel` on the logits of hidden [M, E]; targets, factors and each of kernel_rows are [M];
    sigma [B] and row [M] as for `Network.features`."""
    features = backbone.features(hidden, sigma, row)
    head = backbone.head_weight, backbone.head_bias
    if features.device.type == "cpu" and not torch.is_grad_enabled():
        sums = row_sums(features, *head, targets, kernel.mask_id)
        losses = kernel.of_sums(sums, *kernel_rows).float()
        return HeadLoss(losses=losses, total=(losses * factors).sum())
    total, losses = _ChunkedHead.apply(
        features, *head, targets, factors, kernel.of_logits, kernel_rows, torch.is_grad_enabled()
    )
    return HeadLoss(losses=losses, total=total)


def row_sums(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask_id: int
) -> RowSums:
    """Of the logits of features [M, E], targets [M]. For evaluation on a CPU."""
    dtype, wide = products_dtype(features), wide_dtype(features)
    x, w = features.to(dtype), weight.to(dtype)
    b = None if bias is None else bias.to(dtype)
    rows = _even(len(x), TILE_ROWS)
    columns = CPU_COLUMNS * (TILE_ROWS // rows)
    memory = x.new_empty(rows * columns)
    # nan: the loss of a target that is no token
    norm, picked = (x.new_full((len(x),), torch.nan, dtype=wide) for _ in range(2))
    for start in range(0, len(x), rows):
        part, norms = slice(start, start + rows), []
        for first in range(0, len(w), columns):
            tile = slice(first, first + columns)
            logits = memory[: len(x[part]) * len(w[tile])].view(-1, len(w[tile]))
            products(x[part], w[tile], None if b is None else b[tile], out=logits)
            if first <= mask_id < first + columns:
                # not -inf, of which a tile could consist
                logits[:, mask_id - first] = torch.finfo(dtype).min
            at = targets[part, None] - first
            inside = (at >= 0) & (at < len(w[tile]))
            found = logits.gather(1, at.where(inside, 0))
            picked[part] = torch.where(inside, found, picked[part, None])[:, 0]
            norms.append(_log_sum_exp(logits))
        norm[part] = torch.stack(norms).logsumexp(0)
    return RowSums(norm, picked.masked_fill_(targets == mask_id, -torch.inf))


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Of rows [m, n]: [m]; overwrites them. Half the time of torch.logsumexp, which makes a pass
    for each of its steps."""
    wide = wide_dtype(logits)
    greatest = logits.amax(-1).to(wide)
    in_place = logits if logits.dtype == wide else None
    return greatest - torch.log_softmax(logits, -1, dtype=wide, out=in_place).amax(-1)


class _ChunkedHead(torch.autograd.Function):
    """The factors enter through the [m, E] side of each product, never through the logits."""

    @staticmethod
    def forward(ctx, features, weight, bias, targets, factors, kernel, kernel_rows, training):
        dtype = products_dtype(features)
        x, w = features.to(dtype), weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        if dtype.itemsize == 2 and w.device.type != "cpu":
            w, b = widened(w, b)  # by zeros, whose logits and gradients are 0
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        gradients = None
        # what an input needs is also true under no_grad, and grad mode is always off in here
        if training and any(ctx.needs_input_grad[:3]):
            # times a constant near 1, so that 1 / (B L) is not lost in half precision
            unit = factors.sum().clamp_min(torch.finfo(torch.float32).tiny) / max(len(x), 1)
            gradients = _Gradients(x, w, (factors / unit)[:, None], *ctx.needs_input_grad[1:3])
        size = _chunk_rows(len(x), w)
        logits = torch.empty(min(size, len(x)), len(w), dtype=dtype, device=x.device)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            chunk = logits[: len(x[part])]
            products(x[part], w, b, out=chunk)
            rows = (r[part] for r in kernel_rows)
            real = chunk[:, : len(weight)]
            losses[part] = kernel(real, targets[part], gradients is not None, *rows)
            if gradients is not None:
                gradients.add(part, chunk)
        if gradients is not None:
            # kept on ctx, not saved, so that backward may scale them where they are; then autograd
            # rounds those of narrow weights
            ctx.gradients = [
                None if d is None else d[: len(like)].to(wide_dtype(like))
                for d, like in zip(gradients.sums(), (features, weight, bias), strict=True)
            ]
            ctx.unit = unit
        ctx.mark_non_differentiable(losses)
        return (losses * factors).sum(), losses

    @staticmethod
    def backward(ctx, d_total, _):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of head_loss are given out once: no second backward")
        gradients, ctx.gradients = ctx.gradients, None
        made = [d for d in gradients if d is not None]
        torch._foreach_mul_(made, d_total * ctx.unit)
        return (*gradients, None, None, None, None, None)


class _Gradients:
    """Gradients of sum(factor * losses) with respect to x [M, E], and to w [V, E] and the bias [V]
    where they are trained."""

    def __init__(self, x: Tensor, w: Tensor, factors: Tensor, weighted: bool, biased: bool):
        self.x, self.w, self.factors = x, w, factors
        self.scaled = x * factors.to(x.dtype)
        self.d_x = torch.empty_like(x)
        self.weighted, self.d_w = weighted, None
        self.d_b = torch.zeros(len(w), dtype=torch.float32, device=w.device) if biased else None

    def add(self, part: slice, d_logits: Tensor) -> None:
        """The chunk `part` of the rows, d_logits [m, V]."""
        torch.mm(d_logits, self.w, out=self.d_x[part])
        pulled = d_logits.t()
        if self.d_b is not None:
            self.d_b += torch.mv(pulled, self.factors[part, 0].to(d_logits.dtype))
        if self.weighted:
            self.d_w = _with_product(self.d_w, pulled, self.scaled[part])

    def sums(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.weighted and self.d_w is None:
            self.d_w = torch.zeros_like(self.w, dtype=torch.float32)
        return self.d_x.mul_(self.factors), self.d_w, self.d_b


def _with_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, float32; `total` is overwritten. In half precision a GPU's products are added to
    it as they are, not rounded first, where torch can (NVIDIA's, from 2.8 on)."""
    if a.dtype == torch.float32:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    narrow = a.dtype.itemsize == 2 and a.device.type == "cuda" and torch.version.hip is None
    if not (narrow and hasattr(torch.ops.aten.addmm, "dtype_out")):
        made = torch.mm(a, b)
        return made.float() if total is None else total.add_(made)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _chunk_rows(rows: int, w: Tensor) -> int:
    """As `_even`; on an accelerator a multiple of EVEN_ROWS, for which its library has faster
    kernels."""
    accelerated = w.device.type != "cpu"
    logits = CHUNK_LOGITS_ACCELERATOR if accelerated else CHUNK_LOGITS
    size = _even(rows, max(1, logits // len(w)))
    return -(-size // EVEN_ROWS) * EVEN_ROWS if accelerated else size


def _even(rows: int, most: int) -> int:
    """Rows of a chunk, at most `most`; chunks are about equal, so that none is too small to be
    worth a call."""
    return max(1, -(-rows // max(1, -(-rows // most))))
