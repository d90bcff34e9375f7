"""The transformer of all four algorithms: DiT (arXiv:2212.09748) with rotary positions, or plain
and causal for AR.

It maps tokens to logits in two halves, because most positions never need logits: `hidden` runs the
blocks, `logits` the head. Parameter names are those of the published checkpoints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import get_backend
from .block import Block, OutputLayer, modulate, modulation, of_rows
from .cache import KVCache
from .compiling import compiled, compiling
from .layers import Embedding, Rotary, TimestepEmbedding
from .masks import AttentionMask, BlockCausal, BlockDiffusion
from .recomputing import Recompute

TENSOR_CORE_COLUMNS = 64  # half-precision products with other widths take a path half as fast


class DiT(nn.Module):
    """`adaln=False` builds the AR network: no noise level enters, so there is no modulation."""

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
        """compile: the blocks, by torch.compile; one graph serves them all but the last, which has
        one of its own for any number of rows read. Passes with a cache are compiled on accelerators
        only. activation_checkpointing: as in recomputing.py."""
        super().__init__()
        if hidden_size % n_heads or hidden_size // n_heads % 2:
            raise ValueError(
                f"model.hidden_size={hidden_size} must be an even multiple of"
                f" model.n_heads={n_heads}"
            )
        self.prepare_attention = get_backend(attn_backend)
        self.compiled = compile
        self.recompute = Recompute(activation_checkpointing)
        self.run_block = torch.compile(_run_block) if compile else _run_block
        self.adaln, self.head_width = adaln, hidden_size // n_heads
        self.vocab_embed = Embedding(vocab_size, hidden_size)
        if adaln:
            self.sigma_map = TimestepEmbedding(cond_dim)
        self.rotary_emb = Rotary(self.head_width)
        self.blocks = nn.ModuleList(
            Block(hidden_size, cond_dim, n_heads, dropout, adaln) for _ in range(n_blocks)
        )
        self.output_layer = OutputLayer(vocab_size, hidden_size, cond_dim, adaln)

    @property
    def vocab_size(self) -> int:
        return self.output_layer.linear.out_features

    def hidden(
        self,
        tokens: Tensor,
        sigma: Tensor | None = None,
        *,
        attention_mask: AttentionMask,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        block_sizes: Tensor | None = None,
        cache: KVCache | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, E] of tokens [B, T]; under BlockDiffusion only of the noised
        half, [B, T/2, E], or of both views, [B, 2T/3, E].

        sigma [B]: noise level, None means 0 everywhere. positions [T] or [B, T]: default 0 .. T-1,
        under BlockDiffusion those of each part. document_ids [B, T]: tokens see only their own
        document. block_sizes [B]: `sizes` of BlockDiffusion. read [M]: indices into the flattened
        rows of the result, none twice where gradients are wanted; then only those are finished and
        [M, E] is returned. With a cache the tokens stand behind the committed ones, with one of
        clean_half.py they are the noised half alone; `attention_mask` must be the cache's.
        """
        if cache is not None and attention_mask != cache.attention_mask:
            made = f"this cache was made for {cache.attention_mask}"
            raise ValueError(f"{made}, the pass asks for {attention_mask}")
        if block_sizes is not None:
            attention_mask = replace(attention_mask, sizes=block_sizes)
        # sampling on a CPU is not worth the compiler's minutes
        by_compiler = self.compiled and (cache is None or tokens.device.type != "cpu")
        length = tokens.shape[1]
        noised_only = isinstance(attention_mask, BlockDiffusion) and cache is None
        num_queries = attention_mask.noised(length) if noised_only else length
        with compiling(by_compiler):
            if cache is not None:
                attends, positions = cache.begin(length, by_compiler)
            else:
                attends = self._attends(attention_mask, length, document_ids, tokens.device)
                if positions is None:
                    of_text = length - num_queries or length
                    positions = torch.arange(length, device=tokens.device) % of_text
            begin = compiled(_begin) if by_compiler and cache is not None else _begin
            x, *angles = begin(self.vocab_embed, self.rotary_emb, tokens, positions)
            c = self.conditioning(sigma)
            run = self.run_block if by_compiler else _run_block
            for number, attend in enumerate(attends[:-1]):
                x = self.recompute(run, self.blocks, number, x, c, attend, *angles, length, None)
            if read is not None and self.compiled:
                torch._dynamo.maybe_mark_dynamic(read, 0)
            return run(self.blocks[-1], x, c, attends[-1], *angles, num_queries, read)

    def _attends(self, mask, length, document_ids, device) -> list:
        """The attention of each layer: all alike but the last, which may ask for fewer rows."""
        inner = self.prepare_attention(mask, length, length, document_ids, device)
        final = inner
        if isinstance(mask, BlockDiffusion):
            asked = mask.noised(length)
            final = self.prepare_attention(mask, asked, length, document_ids, device)
        return [inner] * (len(self.blocks) - 1) + [final]

    @contextmanager
    def states(self, rows: int | None = None) -> Iterator[list[Tensor]]:
        """A list that fills, while it is held, with the embedding and every block's output, [B, T,
        E] each; of all T or the first `rows`."""
        states = []
        hooks = [
            layer.register_forward_hook(lambda _, __, output: states.append(output[:, :rows]))
            for layer in (self.vocab_embed, *self.blocks)
        ]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def conditioning(self, sigma: Tensor | None) -> Tensor | None:
        """What modulates the blocks, [B or 1, cond_dim]; one row when sigma is 0 everywhere. None:
        nothing does, or what is cached."""
        if not self.adaln or (sigma is None and self.output_layer.cached_modulation is not None):
            return None
        if sigma is None:
            sigma = torch.zeros(1, device=self.vocab_embed.embedding.device)
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
        product before it, on sums that are not rounded to half precision first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        for block in self.blocks:
            block.gelu_inside = dtype.itemsize == 2
        head = self.output_layer
        head.wide_weight, head.wide_bias = widened(head.linear.weight, head.linear.bias)
        if not self.adaln:
            return
        device = self.vocab_embed.embedding.device.type
        with torch.autocast(device, dtype, enabled=dtype.itemsize == 2):
            c = self.conditioning(None)
            for layer in (*self.blocks, self.output_layer):
                layer.cached_modulation = layer.adaLN_modulation(c)[:, None]

    def new_cache(self, batch: int, window: int, block_size: int, dtype=None) -> KVCache:
        """An empty cache for `batch` rows that see `window` tokens, the current block included."""
        mask = BlockCausal(block_size, window)
        weight = self.vocab_embed.embedding
        n_heads = self.blocks[0].n_heads
        shape = (batch, window + block_size, n_heads, self.head_width)
        # zeros, not empty: a slot nobody may see still enters as 0 * value
        dtype = dtype or products_dtype(weight)
        empty = torch.zeros(shape, dtype=dtype, device=weight.device)
        return KVCache(
            keys=[empty.clone() for _ in self.blocks],
            values=[empty.clone() for _ in self.blocks],
            committed=torch.zeros(batch, dtype=torch.int64, device=weight.device),
            uniform=0,
            attention_mask=mask,
        )


def products_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x are made in: autocast's choice where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def widened(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [V, E] and bias [V] with zeros behind them, up to a width for which tensor cores have
    a fast path; logits there are 0."""
    more = -len(weight) % TENSOR_CORE_COLUMNS
    return F.pad(weight, (0, 0, 0, more)), F.pad(bias, (0, more))


def _run_block(block: Block, *arguments) -> Tensor:
    return block(*arguments)


def _begin(embed: Embedding, rotary: Rotary, tokens: Tensor, positions: Tensor) -> tuple:
    """The residual stream before the first block, cos and sin."""
    return embed(tokens), *rotary(positions)
