"""The last linear layer and a loss on top of it, chunk by chunk: no more than one chunk of logits
exists at a time.

The gradient with respect to the logits is known as soon as a chunk's logits are, because every
token's factor in the scalar loss is known beforehand. So the forward pass multiplies it out at once
and keeps [M, E] and [V, E], never [M, V], and the backward pass only scales.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 1 << 24  # float32 logits held at once: 64 MiB

# (logits float32 [m, V], targets [m], ...) -> nats [m]; with `gradient` the logits are overwritten
# by d nats / d logits
LossKernel = Callable[..., Tensor]


@dataclass(frozen=True)
class HeadLoss:
    nats: Tensor  # float32 [M], without a graph
    total: Tensor  # sum of factor * nats, with a graph


def cross_entropy(logits: Tensor, target: Tensor, gradient: bool, *, mask_id: int) -> Tensor:
    """-log p(target) with the mask id excluded (subs parameterization, arXiv:2406.07524)."""
    logits[:, mask_id] = -torch.inf
    log_z = logits.logsumexp(-1, keepdim=True)
    nats = (log_z - logits.gather(1, target[:, None]))[:, 0]
    if gradient:
        logits.sub_(log_z).exp_()
        logits.scatter_add_(1, target[:, None], torch.full_like(log_z, -1.0))
    return nats


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
    """`kernel` on the logits of hidden [M, E]; targets, factors and each of kernel_rows are [M].

    sigma [B] and row [M] as for `DiT.features`.
    """
    features = backbone.features(hidden, sigma, row)
    linear = backbone.output_layer.linear
    total, nats = _ChunkedHead.apply(
        features, linear.weight, linear.bias, targets, factors, kernel, kernel_rows
    )
    return HeadLoss(nats=nats, total=total)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, targets, factors, kernel, kernel_rows):
        gradient = any(ctx.needs_input_grad[:3])
        dtype = _matmul_dtype(features)
        x, w, b = features.to(dtype), weight.to(dtype), bias.to(dtype)
        nats = torch.empty(len(x), dtype=torch.float32, device=x.device)
        if gradient:
            d_features = torch.empty_like(x)
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
            d_bias = torch.zeros_like(bias, dtype=torch.float32)
        size = max(1, CHUNK_LOGITS // len(w))
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            logits = F.linear(x[part], w, b).float()
            rows = (r[part] for r in kernel_rows)
            nats[part] = kernel(logits, targets[part], gradient, *rows)
            if gradient:
                logits.mul_(factors[part, None])
                d_bias += logits.sum(0)
                d_logits = logits.to(dtype)
                d_features[part] = d_logits @ w
                if dtype == torch.float32:
                    d_weight.addmm_(d_logits.t(), x[part])
                else:
                    d_weight += d_logits.t() @ x[part]
        if gradient:
            ctx.save_for_backward(
                d_features.to(features.dtype), d_weight.to(weight.dtype), d_bias.to(bias.dtype)
            )
        ctx.mark_non_differentiable(nats)
        return (nats * factors).sum(), nats

    @staticmethod
    def backward(ctx, d_total, _):
        return (*(d_total * d for d in ctx.saved_tensors), None, None, None, None)


def _matmul_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
