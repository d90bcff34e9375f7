"""The transformer of Llama (arXiv:2302.13971) and of the models built like it: Qwen2, Qwen3,
Mistral, SmolLM2. Parameter names are those of Hugging Face. No noise level enters.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Pick, angles, look_up, rotate
from .network import Network, widened

ROPE_TYPES = ("default", "linear", "llama3")
INIT_STD = 0.02  # of a network from scratch, as in transformers


@dataclass(frozen=True)
class LlamaShape:
    """Everything that the weights mean something by. `rope_*` beside the base: scaling of the
    frequencies (linear: factor; llama3: all)."""

    vocab_size: int
    hidden_size: int
    n_blocks: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    sliding_window: int | None = None  # tokens beyond which it was trained to see nothing

    def problems(self, names: Mapping[str, str] | None = None) -> Iterator[str]:
        """Why there is no such network. names: what the reader calls the fields."""

        def said(field: str) -> str:
            return f"{(names or {}).get(field, field)}={getattr(self, field)}"

        if self.n_kv_heads > self.n_heads or self.n_heads % self.n_kv_heads:
            yield f"{said('n_heads')} is not a multiple of {said('n_kv_heads')}"
        if self.head_dim % 2:
            yield f"{said('head_dim')} is odd: rotary positions need an even width per head"
        if self.rope_type not in ROPE_TYPES:
            yield f"{said('rope_type')} is not supported, only {', '.join(ROPE_TYPES)}"
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            below = said("rope_low_freq_factor")
            yield f"{said('rope_high_freq_factor')} must be above {below}"


def frequencies(shape: LlamaShape) -> Tensor:
    """Radians per position of each pair of a head, float32 [D/2], as transformers computes them
    (`rope_type` of its modeling_rope_utils.py; llama3: arXiv:2407.21783)."""
    steps = torch.arange(0, shape.head_dim, 2, device="cpu").float() / shape.head_dim
    freq = 1.0 / shape.rope_theta**steps
    if shape.rope_type == "linear":
        return freq / shape.rope_factor
    if shape.rope_type == "default":
        return freq
    low, high = shape.rope_low_freq_factor, shape.rope_high_freq_factor
    turns = shape.rope_original_length * freq / (2 * math.pi)  # of a pair over a training text
    share = ((turns - low) / (high - low)).clamp(0, 1)  # that keeps its speed
    return (1 - share) * freq / shape.rope_factor + share * freq


class LlamaRotary(nn.Module):
    """cos and sin as `Rotary`. Nothing is stored: the frequencies follow from the shape."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.shape = shape
        self.register_buffer("inv_freq", None, persistent=False)
        self.reset()

    def reset(self) -> None:
        """Again, where the buffer lies: transformers does not keep buffers that are in no file."""
        old = self.inv_freq
        made = frequencies(self.shape)
        self.inv_freq = made if old is None or old.is_meta else made.to(old.device)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return angles(positions, self.inv_freq)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) in float32, rounded to the type of x, then scaled: the order of
    transformers."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: LlamaShape):
        super().__init__()
        width, self.head_dim = shape.hidden_size, shape.head_dim
        queries, keys = shape.n_heads * self.head_dim, shape.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, queries, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=shape.o_bias)
        self.q_norm = RMSNorm(self.head_dim, shape.rms_norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, shape.rms_norm_eps) if shape.qk_norm else None

    def forward(self, x: Tensor, attend, cos: Tensor, sin: Tensor, num_queries: int) -> Tensor:
        """[B, T, E] -> what the first `num_queries` rows see, [B, num_queries, H * D]."""
        q = self._heads(self.q_proj(x[:, :num_queries]), self.q_norm)
        k = self._heads(self.k_proj(x), self.k_norm)
        v = self._heads(self.v_proj(x), None)
        q = rotate(q, *(t[..., :num_queries, :] for t in (cos, sin)))
        return attend(q, rotate(k, cos, sin), v).transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """[B, T, H * D] -> [B, H, T, D]."""
        heads = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None:
            heads = norm(heads).to(x.dtype)
        return heads.transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        width, inner, bias = shape.hidden_size, shape.ffn_size, shape.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, shape: LlamaShape, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x, _, attend, cos, sin, num_queries, read):
        """x [B, T, E] -> [B, num_queries, E], or [M, E] where `read` picks rows of the flattened
        B * num_queries. _: no noise level enters."""
        a = self.self_attn(self.input_layernorm(x), attend, cos, sin, num_queries)
        x = x[:, :num_queries]
        if read is not None:
            x, a = (Pick.apply(y.flatten(0, 1), read) for y in (x, a))  # [M, E], [M, H * D]
        x = x + self._drop(self.self_attn.o_proj(a))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class _Embedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return look_up(tokens, self.weight)


class _Inside(nn.Module):
    """What transformers calls `model`: all but the head."""

    def __init__(self, shape: LlamaShape, dropout: float):
        super().__init__()
        self.embed_tokens = _Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(shape, dropout) for _ in range(shape.n_blocks))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Llama(Network):
    def __init__(
        self,
        *,
        dropout: float = 0.0,
        attn_backend: str = "sdpa",
        compile: bool = False,
        activation_checkpointing: str = "none",
        **shape,
    ):
        """shape: the fields of LlamaShape. dropout: on what a layer adds to the residual stream."""
        super().__init__(attn_backend, compile, activation_checkpointing)
        self.shape = LlamaShape(**shape)
        if problem := next(self.shape.problems(), None):
            raise ValueError(problem)
        self.kv_heads, self.head_width = self.shape.n_kv_heads, self.shape.head_dim
        self.model = _Inside(self.shape, dropout)
        if not self.shape.tied:
            width, rows = self.shape.hidden_size, self.shape.vocab_size
            self.lm_head = nn.Linear(width, rows, bias=False)
        self.rotary = LlamaRotary(self.shape)
        self.register_buffer("wide_weight", None, persistent=False)  # see freeze
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def embed(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def embeddings(self) -> Tensor:
        return self.model.embed_tokens.weight

    @property
    def head_weight(self) -> Tensor:
        return self.embeddings if self.shape.tied else self.lm_head.weight

    head_bias = None

    def check_length(self, tokens: int) -> None:
        window = self.shape.sliding_window
        if window is not None and tokens > window:
            raise ValueError(
                f"this network was trained with a sliding window of {window} tokens, which is not"
                f" supported: a text or sampling.context_size of {tokens} tokens is longer; use at"
                f" most {window} (model.length)"
            )

    def features(
        self, hidden: Tensor, sigma: Tensor | None = None, row: Tensor | None = None
    ) -> Tensor:
        """What the last linear layer sees, for hidden [..., E]. sigma must be None; row: unused, as
        without noise level all rows are alike."""
        self.conditioning(sigma)
        return self.model.norm(hidden)

    def logits(
        self, hidden: Tensor, sigma: Tensor | None = None, row: Tensor | None = None
    ) -> Tensor:
        """Raw logits [..., V]; arguments as for `features`."""
        features = self.features(hidden, sigma, row)
        if self.wide_weight is None:
            return F.linear(features, self.head_weight)
        return F.linear(features, self.wide_weight)[..., : self.vocab_size]

    @torch.no_grad()
    def freeze(self, dtype: torch.dtype) -> None:
        """For evaluation only: keep the weights of linear layers in `dtype`, to be used under the
        same autocast, and the head's as wide as tensor cores like."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        self.wide_weight, _ = widened(self.head_weight.to(dtype), None)
