"""A block of the transformer and the layer behind the last one, each modulated by the noise level.
Parameter names are those of the published checkpoints."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attend
from .by_kernel import ByKernel
from .cache import Decode
from .kernels.few_rows import MOST_ROWS, added_product, normed_product, takes
from .kernels.heads import can_split, rotated_heads
from .kernels.mlp import can_fuse_mlp, mlp
from .kernels.residual import can_fuse, new_seed, residual
from .layers import Norm, Pick, rotate
from .lora import parts
from .network import products_dtype

CPU_ROWS = 256  # of the MLP at a time where no gradient is wanted: its inner layer stays in a cache


class Block(nn.Module):
    """Attention and MLP, each normalised, modulated by the noise level, gated and added."""

    def __init__(self, width: int, cond_dim: int, n_heads: int, dropout: float, adaln: bool):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.norm1 = Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = Norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.gelu_inside = self.few_rows = False  # see freeze
        self.register_buffer("cached_modulation", None, persistent=False)
        if adaln:
            self.adaLN_modulation = _zero(nn.Linear(cond_dim, 6 * width))

    def _attended(self, x: Tensor, attend: Attend, cos, sin, num_queries: int) -> Tensor:
        """[B, T, E] -> what the first `num_queries` rows see, [B, num_queries, E]."""
        if num_queries < x.shape[1]:
            return _joined(attend(*self._fewer_queries(x, num_queries, cos, sin)))
        qkv = self.attn_qkv(x)
        if isinstance(attend, ByKernel) and attend.takes(qkv, self.n_heads):
            return attend.rotated(qkv, cos, sin, self.n_heads)
        if can_split(qkv, self.n_heads):
            split = rotated_heads(qkv, cos, sin, self.n_heads)
            return _joined(attend(*(x.transpose(1, 2) for x in split)))
        qk, v = self._heads(qkv, 3).split((2, 1))  # of [3, B, H, T, D]
        return _joined(attend(*rotate(qk, cos, sin).unbind(), v[0]))

    def _fewer_queries(
        self, x: Tensor, num_queries: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, E] -> q of the first `num_queries` rows, all k, v, [B, H, ., D]; q, k rotated."""
        width = x.shape[-1]
        to_queries, to_keys_values = parts(self.attn_qkv, (width, 2 * width))
        q = self._heads(to_queries(x[:, :num_queries]), 1)
        k, v = self._heads(to_keys_values(x), 2).unbind()
        q_cos, q_sin = (t[..., :num_queries, :] for t in (cos, sin))
        return rotate(q[0], q_cos, q_sin), rotate(k, cos, sin), v

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """[B, T, parts * E] -> [parts, B, H, T, D]."""
        return x.unflatten(-1, (parts, self.n_heads, -1)).permute(2, 0, 3, 1, 4)

    def freeze(self, dtype: torch.dtype) -> None:
        """See DiT.freeze; of the weights, which are in `dtype` by now."""
        first, _, second = self.mlp
        self.gelu_inside = dtype.itemsize == 2
        self.few_rows = takes(self.attn_qkv, self.attn_out, first, second)

    def forward(self, x, c, attend, cos, sin, num_queries, read):
        """x [B, T, E] -> [B, num_queries, E], or [M, E] where `read` picks rows of the flattened
        B * num_queries."""
        few = self.few_rows and c is None and isinstance(attend, Decode) and not self.training
        if few and x.shape[0] * x.shape[1] <= MOST_ROWS:
            return self._few_rows(x, attend, cos, sin, read)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(self, c, 6)
        fused = can_fuse(x)
        if fused:
            x, y = self._fused(x, None, None, self.norm1, shift, scale)
        else:
            y = modulate(self.norm1(x), shift, scale)
        if isinstance(attend, Decode):
            a = attend(self.attn_qkv(y), cos, sin)
        else:
            a = self._attended(y, attend, cos, sin, num_queries)
        x = x[:, :num_queries]
        if read is not None:
            row = read // num_queries
            parts = [gate, mlp_shift, mlp_scale, mlp_gate]
            gate, mlp_shift, mlp_scale, mlp_gate = (of_rows(part, row) for part in parts)
            x, a = (Pick.apply(y.flatten(0, 1), read) for y in (x, a))  # [M, E]
        if fused and x.dim() == 3:
            x, y = self._fused(x, self.attn_out(a), gate, self.norm2, mlp_shift, mlp_scale)
            return self._fused(x, self._mlp(y), mlp_gate)[0]
        x = _added(x, gate, self._drop(self.attn_out(a)))
        y = self._mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))
        return _added(x, mlp_gate, self._drop(y))

    def _few_rows(self, x: Tensor, attend: Decode, cos: Tensor, sin: Tensor, read) -> Tensor:
        """The same where every product is one kernel with what stands around it."""
        made, (first, _, second) = self.cached_modulation, self.mlp
        qkv = normed_product(x, self.norm1.weight, made, 0, self.attn_qkv.weight, None, False)
        a = attend(qkv, cos, sin)
        x = added_product(x, a, made, 0, self.attn_out.weight, None, read)
        y = normed_product(x, self.norm2.weight, made, 1, first.weight, first.bias, True)
        return added_product(x, y, made, 1, second.weight, second.bias, None)

    def _mlp(self, x: Tensor) -> Tensor:
        first, _, second = self.mlp
        if can_fuse_mlp(x, first, second):
            x = x.to(products_dtype(x))
            weight, weight2, bias2 = (
                w.to(x.dtype) for w in (first.weight, second.weight, second.bias)
            )
            return mlp(x, weight, first.bias, weight2, bias2)[0]
        if x.device.type == "cpu" and not (
            torch.is_grad_enabled() or torch.compiler.is_compiling()
        ):
            rows = x.flatten(0, -2).split(CPU_ROWS)
            return torch.cat([self.mlp(some) for some in rows]).view_as(x)
        if not self.gelu_inside or x.device.type != "cuda":
            return self.mlp(x)
        rows = x.to(first.weight.dtype).flatten(0, -2)
        rows = torch._addmm_activation(first.bias, rows, first.weight.t(), use_gelu=True)
        return second(rows).view_as(x)

    def _fused(self, x, branch, gate, norm=None, shift=None, scale=None) -> tuple[Tensor, Tensor]:
        """x + gate * dropout(branch), and that normed and modulated; see kernels/residual.py."""
        drops = branch is not None and self.training and self.dropout > 0
        seed = new_seed(x.device) if drops else None
        weight = None if norm is None else norm.weight
        dtype = products_dtype(x)
        return residual(x, branch, gate, seed, self.dropout, weight, shift, scale, dtype)[:2]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class OutputLayer(nn.Module):
    def __init__(self, vocab_size: int, width: int, cond_dim: int, adaln: bool):
        super().__init__()
        self.norm_final = Norm(width)
        self.linear = _zero(nn.Linear(width, vocab_size))
        for name in ("cached_modulation", "wide_weight", "wide_bias"):
            self.register_buffer(name, None, persistent=False)
        if adaln:
            self.adaLN_modulation = _zero(nn.Linear(cond_dim, 2 * width))

    def logits(self, features: Tensor) -> Tensor:
        if self.wide_weight is None:
            return self.linear(features)
        return F.linear(features, self.wide_weight, self.wide_bias)[..., : len(self.linear.weight)]


def _joined(heads: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H D]."""
    return heads.transpose(1, 2).flatten(2)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def modulation(layer: Block | OutputLayer, c: Tensor | None, parts: int) -> list[Tensor | None]:
    """shift, scale, gate of a block's attention, then of its MLP; shift, scale of the head: each [B
    or 1, 1, E]. c None: no modulation, or the cached one (`DiT.freeze`)."""
    if c is None and layer.cached_modulation is None:
        return [None] * parts
    made = layer.cached_modulation if c is None else layer.adaLN_modulation(c)[:, None]
    return list(made.chunk(parts, -1))


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    return x if shift is None else torch.addcmul(shift, x, 1 + scale)


def _added(x: Tensor, gate: Tensor | None, y: Tensor) -> Tensor:
    """The residual stream x and what a layer adds to it, gated."""
    return x + y if gate is None else torch.addcmul(x, gate, y)


def of_rows(part: Tensor | None, row: Tensor | None) -> Tensor | None:
    """A modulation [B or 1, 1, E] for M rows of the batch: [M, E], or [1, E] if all share it."""
    if part is None:
        return None
    return part[:, 0] if len(part) == 1 else part[row, 0]
