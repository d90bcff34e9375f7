"""What all networks share, and what objectives, samplers and estimators know of them.

A network maps tokens to logits in two halves, because most positions never need logits: `hidden`
runs the blocks, `logits` the head. A class defines the parts named in `Network` and the parameters.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adaptation import PLAIN, Adaptation
from .attention import get_backend
from .cache import KVCache
from .compiling import compiled, compiling
from .masks import AttentionMask, BlockDiffusion
from .recomputing import Recompute

TENSOR_CORE_COLUMNS = 64  # half-precision products with other widths take a path half as fast
# Of a wide product on a CPU at a time: what is made then stays in a core's cache while the bias and
# the parts of the sum are added. A quarter faster than all columns at once.
CPU_COLUMNS = 1024


class Network(nn.Module):
    """Beside what is annotated here a class defines `features`, `logits` and `freeze`. A block is
    called as block(x, c, attend, cos, sin, num_queries, read); see block.py."""

    blocks: nn.ModuleList
    embed: nn.Module  # tokens [B, T] -> [B, T, E]
    rotary: nn.Module  # positions [..., T] -> cos, sin [..., 1, T, D/2]
    embeddings: Tensor  # the parameter [V, E]
    head_weight: Tensor  # of the last linear layer, [V, E]
    head_bias: Tensor | None  # [V]
    kv_heads: int  # heads of keys and values
    head_width: int  # D
    decodes = False  # whether its blocks take the attention of kernels/decode.py
    masters = None  # float32 copies of weights that training keeps in bfloat16: Masters

    def __init__(self, attn_backend: str, compile: bool, activation_checkpointing: str):
        """compile: the blocks, by torch.compile; one graph serves them all but the last, which has
        one of its own for any number of rows read. Passes with a cache are compiled on accelerators
        only. activation_checkpointing: as in recomputing.py."""
        super().__init__()
        self.prepare_attention = get_backend(attn_backend)
        self.compiled = compile
        self.recompute = Recompute(activation_checkpointing)
        self.run_block = torch.compile(_run_block) if compile else _run_block

    def compile_inside_hooks(self) -> None:
        """Where blocks are compiled: leave out the hooks around them, which the compiler cannot
        follow (fsdp puts weights together in them). Still one graph serves them all."""
        if self.compiled:
            self.run_block, forward = _run_block, torch.compile(_forward)
            for block in self.blocks:
                block.forward = functools.partial(forward, block)

    @property
    def vocab_size(self) -> int:
        return len(self.head_weight)

    @property
    def hidden_size(self) -> int:
        return self.embeddings.shape[1]

    def hidden(
        self,
        tokens: Tensor,
        sigma: Tensor | None = None,
        *,
        attention_mask: AttentionMask,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        block_sizes: Tensor | None = None,
        open_blocks: Tensor | None = None,
        cache: KVCache | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, E] of tokens [B, T]; under BlockDiffusion only of the noised
        half, [B, T/2, E], or of both views, [B, 2T/3, E], unless it is of `both` parts.

        sigma [B]: noise level, None means 0 everywhere. positions [T] or [B, T]: default 0 .. T-1,
        under BlockDiffusion those of each part. document_ids [B, T]: tokens see only their own
        document. block_sizes [B]: `sizes` of BlockDiffusion. open_blocks [B, T]: `open` of
        CausalClean. read [M]: indices into the flattened rows of the result, none twice where
        gradients are wanted; then only those are finished and [M, E] is returned. With a cache the
        tokens stand behind the committed ones, with one of clean_half.py they are the noised half
        alone; `attention_mask` must be the cache's.
        """
        if cache is not None and attention_mask != cache.attention_mask:
            made = f"this cache was made for {cache.attention_mask}"
            raise ValueError(f"{made}, the pass asks for {attention_mask}")
        if block_sizes is not None:
            attention_mask = replace(attention_mask, sizes=block_sizes)
        if open_blocks is not None:
            attention_mask = replace(attention_mask, open=open_blocks)
            cache = cache and replace(cache, attention_mask=attention_mask)
        # sampling on a CPU is not worth the compiler's minutes
        by_compiler = self.compiled and (cache is None or tokens.device.type != "cpu")
        length = tokens.shape[1]
        num_queries = of_text = length
        if isinstance(attention_mask, BlockDiffusion) and cache is None:
            num_queries = attention_mask.answered(length)
            of_text = length - attention_mask.noised(length)
        self.check_length(of_text)
        with compiling(by_compiler):
            if cache is not None:
                attends, positions = cache.begin(length, by_compiler)
            else:
                attends = self._attends(attention_mask, length, document_ids, tokens.device)
                if positions is None:
                    positions = torch.arange(length, device=tokens.device) % of_text
            begin = compiled(_begin) if by_compiler and cache is not None else _begin
            x, *angles = begin(self.embed, self.rotary, tokens, positions)
            c = self.conditioning(sigma)
            run = self.run_block if by_compiler else _run_block
            for number, attend in enumerate(attends[:-1]):
                x = self.recompute(run, self.blocks, number, x, c, attend, *angles, length, None)
            if read is not None and self.compiled:
                torch._dynamo.maybe_mark_dynamic(read, 0)
            return run(self.blocks[-1], x, c, attends[-1], *angles, num_queries, read)

    def check_length(self, tokens: int) -> None:
        """ValueError where the network is not defined on texts, or windows, of so many tokens."""

    def conditioning(self, sigma: Tensor | None) -> Tensor | None:
        """What modulates the blocks, [B or 1, cond_dim]. None: nothing does."""
        if sigma is not None:
            raise ValueError(f"{type(self).__name__} takes no noise level")
        return None

    def _attends(self, mask, length, document_ids, device) -> list:
        """The attention of each layer: all alike but the last, which may ask for fewer rows."""
        inner = self.prepare_attention(mask, length, length, document_ids, device)
        final = inner
        if isinstance(mask, BlockDiffusion):
            asked = mask.answered(length)
            final = self.prepare_attention(mask, asked, length, document_ids, device)
        return [inner] * (len(self.blocks) - 1) + [final]

    @contextmanager
    def states(self, rows: int | None = None) -> Iterator[list[Tensor]]:
        """A list that fills, while it is held, with the embedding and every block's output, [B, T,
        E] each; of all T or the first `rows`."""
        states = []
        hooks = [
            layer.register_forward_hook(lambda _, __, output: states.append(output[:, :rows]))
            for layer in (self.embed, *self.blocks)
        ]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def new_cache(
        self,
        batch: int,
        window: int,
        block_size: int,
        dtype=None,
        adapt: Adaptation = PLAIN,
    ) -> KVCache:
        """An empty cache for `batch` rows that see `window` tokens, the current block included."""
        self.check_length(window)
        weight = self.embeddings
        # where the token before a block is asked again with it, it sees a block further back
        slots = window + block_size * (1 + adapt.shifted)
        shape = (batch, slots, self.kv_heads, self.head_width)
        # zeros, not empty: a slot nobody may see still enters as 0 * value
        dtype = dtype or products_dtype(weight)
        empty = torch.zeros(shape, dtype=dtype, device=weight.device)
        return KVCache(
            keys=[empty.clone() for _ in self.blocks],
            values=[empty.clone() for _ in self.blocks],
            committed=torch.zeros(batch, dtype=torch.int64, device=weight.device),
            uniform=0,
            attention_mask=adapt.sampling_mask(block_size, window),
            decodes=self.decodes and not adapt.causal,  # whose mask the kernel does not have
        )


def products_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x are made in: autocast's choice where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def products(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [M, V] = x [M, E] weight^T + bias."""
    at_once = CPU_COLUMNS if x.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), at_once):
        part = slice(start, start + at_once)
        if bias is None:
            torch.mm(x, weight[part].t(), out=out[:, part])
        else:
            torch.addmm(bias[part], x, weight[part].t(), out=out[:, part])


def widened(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight [V, E] and bias [V] with zeros behind them, up to a width for which tensor cores have
    a fast path; logits there are 0."""
    more = -len(weight) % TENSOR_CORE_COLUMNS
    return F.pad(weight, (0, 0, 0, more)), None if bias is None else F.pad(bias, (0, more))


def _run_block(block: nn.Module, *arguments) -> Tensor:
    return block(*arguments)


def _forward(block: nn.Module, *arguments) -> Tensor:
    return type(block).forward(block, *arguments)


def _begin(embed: nn.Module, rotary: nn.Module, tokens: Tensor, positions: Tensor) -> tuple:
    """The residual stream before the first block, cos and sin."""
    return embed(tokens), *rotary(positions)
