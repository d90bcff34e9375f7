"""Who may look at whom: the attention masks, as predicates on token indices.

`allowed(q, k, keys)` says whether query index q may see key index k of `keys`. It is written with
broadcasting operators only, so it serves dense masks, cached passes and FlexAttention alike.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Full:
    """Everybody sees everybody: MDLM and SEDD."""

    def allowed(self, q: Tensor, k: Tensor, keys: int) -> Tensor:
        return (q >= 0) & (k >= 0)


@dataclass(frozen=True)
class BlockCausal:
    """A token sees its own block and the earlier ones: the clean sequence, and sampling. `window`
    limits the view to so many tokens, counted in whole blocks, the query's own included."""

    block_size: int
    window: int | None = None

    def __post_init__(self):
        if self.window is not None and self.window % self.block_size:
            raise ValueError(
                f"a window of {self.window} tokens is not a multiple of"
                f" block_size={self.block_size}"
            )

    def allowed(self, q: Tensor, k: Tensor, keys: int) -> Tensor:
        behind = q // self.block_size - k // self.block_size
        if self.window is None:
            return behind >= 0
        return (behind >= 0) & (behind < self.window // self.block_size)


def Causal(window: int | None = None) -> BlockCausal:
    """A token sees itself and what is to its left: AR, block-causal with blocks of one."""
    return BlockCausal(1, window)


@dataclass(frozen=True)
class CausalClean:
    """Sampling where clean tokens see as in an AR network: a token sees itself and the earlier
    ones. In a block that is being written it sees all of its block too: where `open`, boolean [B,
    T] of the queries. `window` as in BlockCausal."""

    block_size: int
    window: int | None = None
    open: Tensor | None = None

    def allowed(self, q: Tensor, k: Tensor, keys: int, open: Tensor | bool = False) -> Tensor:
        """open: of the queries, in place of the field; it broadcasts against q and k."""
        earlier = BlockCausal(self.block_size, self.window).allowed(q, k, keys)
        own = q // self.block_size == k // self.block_size
        return earlier & ((k <= q) | (own & open))


@dataclass(frozen=True)
class BlockDiffusion:
    """The training mask over [x_t ; x0] (arXiv:2503.09573, section 3.1), both halves keys / 2 long.

    A query in block b of x_t sees block b of x_t and the blocks before b of x0; a query in block b
    of x0 sees the blocks up to b of x0. With two `views` it is over [x_t ; x_t' ; x0], three parts
    of equal length: the noised versions do not see each other.

    Where rows differ in the size of their blocks, `sizes` int64 [B] has it, and `block_size` is a
    multiple of all: a number that tensors depend on, and no constant of what is compiled.

    causal: a query of x0 sees itself and the tokens of x0 before it, not all of its block. both: a
    network answers for all parts, not only for those that are noised.
    """

    block_size: int
    views: int = 1
    sizes: Tensor | None = None
    causal: bool = False
    both: bool = False

    def noised(self, keys: int) -> int:
        """How many of the tokens are noised."""
        return keys // (self.views + 1) * self.views

    def answered(self, keys: int) -> int:
        """For how many of the tokens a network answers."""
        return keys if self.both else self.noised(keys)

    def allowed(self, q: Tensor, k: Tensor, keys: int, size: Tensor | None = None) -> Tensor:
        """size: of the blocks, in place of block_size; it broadcasts against q and k."""
        size = self.block_size if size is None else size
        length = keys // (self.views + 1)
        if self.views > 1:
            return self._allowed_in_views(q, k, length, size)
        clean_q, clean_k = q >= length, k >= length
        block_q = (q - length * clean_q) // size
        block_k = (k - length * clean_k) // size
        own = ~clean_q & ~clean_k & (block_q == block_k)
        earlier = ~clean_q & clean_k & (block_q > block_k)
        return own | earlier | (clean_q & clean_k & self._among_clean(q, k, block_q, block_k))

    def _among_clean(self, q: Tensor, k: Tensor, block_q: Tensor, block_k: Tensor) -> Tensor:
        return q >= k if self.causal else block_q >= block_k

    def _allowed_in_views(self, q: Tensor, k: Tensor, length: int, size: int | Tensor) -> Tensor:
        part_q, part_k = q // length, k // length
        block_q, block_k = q % length // size, k % length // size
        clean_q, clean_k = part_q == self.views, part_k == self.views
        own = ~clean_q & (part_q == part_k) & (block_q == block_k)
        earlier = ~clean_q & clean_k & (block_q > block_k)
        return own | earlier | (clean_q & clean_k & self._among_clean(q, k, block_q, block_k))


AttentionMask = Full | BlockCausal | CausalClean | BlockDiffusion
