"""The transformer of all four algorithms: DiT (arXiv:2212.09748) with rotary positions, or plain
and causal for AR. Parameter names are those of the published checkpoints."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block, OutputLayer, modulate, modulation, of_rows
from .layers import Embedding, Rotary, TimestepEmbedding
from .network import Network, widened


class DiT(Network):
    """`adaln=False` builds the AR network: no noise level enters, so there is no modulation."""

    decodes = True

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        cond_dim: int,
        n_blocks: int,
        n_heads: int,
        dropout: float = 0.1,
        adaln: bool = True,
        attn_backend: str = "sdpa",
        compile: bool = False,
        activation_checkpointing: str = "none",
    ):
        super().__init__(attn_backend, compile, activation_checkpointing)
        if hidden_size % n_heads or hidden_size // n_heads % 2:
            raise ValueError(
                f"model.hidden_size={hidden_size} must be an even multiple of"
                f" model.n_heads={n_heads}"
            )
        self.adaln, self.kv_heads, self.head_width = adaln, n_heads, hidden_size // n_heads
        self.vocab_embed = Embedding(vocab_size, hidden_size)
        if adaln:
            self.sigma_map = TimestepEmbedding(cond_dim)
        self.rotary_emb = Rotary(self.head_width)
        self.blocks = nn.ModuleList(
            Block(hidden_size, cond_dim, n_heads, dropout, adaln) for _ in range(n_blocks)
        )
        self.output_layer = OutputLayer(vocab_size, hidden_size, cond_dim, adaln)

    @property
    def embed(self) -> Embedding:
        return self.vocab_embed

    @property
    def rotary(self) -> Rotary:
        return self.rotary_emb

    @property
    def embeddings(self) -> Tensor:
        return self.vocab_embed.embedding

    @property
    def head_weight(self) -> Tensor:
        return self.output_layer.linear.weight

    @property
    def head_bias(self) -> Tensor:
        return self.output_layer.linear.bias

    def conditioning(self, sigma: Tensor | None) -> Tensor | None:
        """What modulates the blocks, [B or 1, cond_dim]; one row when sigma is 0 everywhere. None:
        nothing does, or what is cached."""
        if not self.adaln or (sigma is None and self.output_layer.cached_modulation is not None):
            return None
        if sigma is None:
            sigma = torch.zeros(1, device=self.embeddings.device)
        return F.silu(self.sigma_map(sigma))

    def features(
        self, hidden: Tensor, sigma: Tensor | None = None, row: Tensor | None = None
    ) -> Tensor:
        """What the last linear layer sees, for hidden [M, E] or [B, T, E]. sigma None or [B]; with
        it row [M]: the sample each of M hidden rows belongs to."""
        x = self.output_layer.norm_final(hidden)
        shift, scale = modulation(self.output_layer, self.conditioning(sigma), 2)
        if hidden.dim() == 2:
            shift, scale = of_rows(shift, row), of_rows(scale, row)
        return modulate(x, shift, scale)

    def logits(
        self, hidden: Tensor, sigma: Tensor | None = None, row: Tensor | None = None
    ) -> Tensor:
        """Raw logits [..., V] of the rows asked for; arguments as for `features`."""
        return self.output_layer.logits(self.features(hidden, sigma, row))

    @torch.no_grad()
    def freeze(self, dtype: torch.dtype) -> None:
        """For evaluation only: keep what each pass would make anew, the modulation at sigma 0 and
        the weights of linear layers in `dtype`, to be used under the same autocast; and the head's
        weights as wide as tensor cores like. In half precision on CUDA the GELU is made inside the
        product before it, on sums that are not rounded to half precision first, and a pass of few
        rows with a cache has a kernel of its own for each product (kernels/few_rows.py)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        for block in self.blocks:
            block.freeze(dtype)
        head = self.output_layer
        head.wide_weight, head.wide_bias = widened(head.linear.weight, head.linear.bias)
        if not self.adaln:
            return
        device = self.embeddings.device.type
        with torch.autocast(device, dtype, enabled=dtype.itemsize == 2):
            c = self.conditioning(None)
            for layer in (*self.blocks, self.output_layer):
                layer.cached_modulation = layer.adaLN_modulation(c)[:, None]
