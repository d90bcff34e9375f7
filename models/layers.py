"""The small parts of the transformer: norm, embeddings, rotary positions, a choice of rows."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMESTEP_FEATURES = 256
ROTARY_BASE = 10_000
MAX_PERIOD = 10_000


class Norm(nn.Module):
    """LayerNorm with a scale and no bias, in float32 whatever comes in (also under autocast)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float())


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, tokens: Tensor) -> Tensor:
        return look_up(tokens, self.embedding)


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums are made in: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def look_up(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows of table [V, E] for tokens [B, T], in float32 at least: the residual stream begins with
    them. The gradients of a row are summed in float32 too, as those of a frequent token would be
    lost in bfloat16."""
    wide = wide_dtype(table)
    if table.requires_grad and torch.is_grad_enabled():
        table = table.to(wide)
    return F.embedding(tokens, table).to(wide)  # table[ids] has an irreproducible backward pass


class TimestepEmbedding(nn.Module):
    """sigma [B] -> features [B, cond_dim]."""

    def __init__(self, cond_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FEATURES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )

    def forward(self, sigma: Tensor) -> Tensor:
        half = TIMESTEP_FEATURES // 2
        steps = torch.arange(half, dtype=torch.float32, device=sigma.device)
        angles = sigma[:, None].float() * torch.exp(-math.log(MAX_PERIOD) / half * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class Rotary(nn.Module):
    """Rotary position embedding (arXiv:2104.09864), halves rotated as in GPT-NeoX."""

    def __init__(self, head_width: int):
        super().__init__()
        steps = torch.arange(0, head_width, 2).float() / head_width
        self.register_buffer("inv_freq", 1.0 / ROTARY_BASE**steps)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return angles(positions, self.inv_freq)


def angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, [..., 1, T, D/2] for positions [..., T] and radians per position [D/2].

    Angles are made in float64: in float32 they are off by 0.01 at position 131 000.
    """
    turned = positions[..., None].double() * inv_freq.double()
    return turned.cos().float().unsqueeze(-3), turned.sin().float().unsqueeze(-3)


class _Rotate(torch.autograd.Function):
    """Its own derivative with the angle turned round, so nothing is kept but cos and sin."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _turned(grad, *ctx.saved_tensors, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    a, b = x.chunk(2, -1)
    turned = torch.addcmul(a * cos, b, sin, value=-sign), torch.addcmul(b * cos, a, sin, value=sign)
    return torch.cat(turned, -1).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x [..., T, D] by the angles of its position, in float32."""
    return _Rotate.apply(x, cos, sin)


class Pick(torch.autograd.Function):
    """x[rows] of x [N, E], no row twice: so the derivative needs neither sorting nor a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(x)
        return x[rows]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rows,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.count, grad.shape[1])
        return out.index_copy_(0, rows, grad), None
