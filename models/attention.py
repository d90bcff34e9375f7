"""Attention backends: three ways to compute the same numbers.

A backend is a function `prepare(mask, queries, keys, document_ids, device) -> attend(q, k, v)`.
What depends on the mask alone is made once by `prepare` and shared by all layers of a pass.

    q [B, H, T, D]   k, v [B, K, S, D]   ->   [B, H, T, D]

K divides H: each head of keys and values serves H / K heads of queries in a row
(arXiv:2305.13245).

`document_ids` [B, S] keep texts of one row apart (documents packed together, padding): a query sees
only keys of its own document. Where rows differ in the size of their blocks, `mask.sizes` [B] has
it. With the block-diffusion mask T is S (all parts ask) or, where only what is noised is read,
S / 2, with two views 2 S / 3.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .by_kernel import ByKernel
from .compiling import compiled
from .kernels.starting import can_start
from .masks import AttentionMask, BlockCausal, BlockDiffusion, CausalClean, Full

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Prepare = Callable[[AttentionMask, int, int, Tensor | None, torch.device], Attend]

# Queries taken at a time by the split form: smaller wastes calls, larger computes what is masked.
CHUNK_TOKENS = 128
SHARED_MEMORY = 128 << 10  # bytes per block that torch's default tiles of FlexAttention may need
# Faster than torch's own choice on an H100 at a head width of 64 in half precision, by 20 percent.
LARGE_TILES = {
    "fwd_BLOCK_M": 128,
    "fwd_BLOCK_N": 64,
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 32,
    "num_warps": 4,
    "num_stages": 3,
}
SMALL_TILES = {
    "BLOCK_M": 64,
    "BLOCK_N": 64,
    "BLOCK_M1": 32,
    "BLOCK_N1": 64,
    "BLOCK_M2": 64,
    "BLOCK_N2": 32,
}


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """scaled_dot_product_attention, also where keys and values have fewer heads. Under a mask they
    are repeated: torch's fast kernels with one take equal numbers of heads only."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    elif groups > 1:
        options["enable_gqa"] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def dense_mask(
    mask: AttentionMask, q: Tensor, k: Tensor, keys: int, document_ids: Tensor | None = None
) -> Tensor:
    """The mask at the indices q [T], k [S], boolean: [T, S], or where rows differ, by document_ids
    or as of_rows says, [B, 1, T, S]."""
    own = of_rows(mask)
    if own is not None:
        own = own[:, None, None] if own.dim() == 1 else own[:, q, None]
    seen = mask.allowed(q[:, None], k[None, :], keys, *(() if own is None else (own,)))
    if document_ids is not None:
        seen = seen & (document_ids[:, q, None] == document_ids[:, None, k])
    return seen if seen.dim() == 2 else seen[:, None]


def of_rows(mask: AttentionMask) -> Tensor | None:
    """What rows differ in: the sizes of their blocks [B], or which queries are in open ones [B, T];
    None: all rows have the same mask."""
    if isinstance(mask, CausalClean):
        return mask.open
    return mask.sizes if isinstance(mask, BlockDiffusion) else None


def dense(
    mask: AttentionMask, queries: int, keys: int, document_ids: Tensor | None, device: torch.device
) -> Attend:
    """One call over one [T, S] mask: the plain form every other is tested against."""
    q, k = torch.arange(queries, device=device), torch.arange(keys, device=device)
    seen = dense_mask(mask, q, k, keys, document_ids)
    return lambda q, k, v: attention(q, k, v, seen)


def sdpa(
    mask: AttentionMask, queries: int, keys: int, document_ids: Tensor | None, device: torch.device
) -> Attend:
    """scaled_dot_product_attention, split so that blocks nobody may see are mostly not computed."""
    if isinstance(mask, Full) and document_ids is None:
        return attention
    if mask == BlockCausal(1) and document_ids is None:
        return functools.partial(attention, is_causal=True)
    if isinstance(mask, BlockDiffusion):
        return _split_block_diffusion(mask, queries, keys, document_ids, device)
    return dense(mask, queries, keys, document_ids, device)


def _split_block_diffusion(mask, queries, keys, document_ids, device) -> Attend:
    """Chunk i of x_t and of x0 asks; chunk i of x_t and chunks 0..i of x0 answer. With two views
    chunk i of each is in the place of that of x_t.

    About a quarter of the dense (2L)^2 is computed, and no mask of that size exists.
    """
    views = mask.views
    length = keys // (views + 1)
    asking = queries // length  # parts that ask
    size = min(mask.block_size * max(1, CHUNK_TOKENS // mask.block_size), length)
    borders = [(start, min(start + size, length)) for start in range(0, length, size)]
    masks = []
    for start, stop in borders:
        chunks = [torch.arange(start, stop, device=device) + i * length for i in range(views + 1)]
        clean = torch.arange(stop, device=device) + views * length
        q, k = torch.cat(chunks[:asking]), torch.cat([*chunks[:views], clean])
        masks.append(dense_mask(mask, q, k, keys, document_ids))
    sizes = [stop - start for start, stop in borders]
    count = len(sizes)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # split, never slice: the backward pass of a slice fills a whole tensor with zeros
        q = q.split(sizes * asking, 2)
        k, v = k.split(sizes * (views + 1), 2), v.split(sizes * (views + 1), 2)
        answers = [[] for _ in range(asking)]
        first = views * count  # chunk of x0
        for i, mask in enumerate(masks):
            asked = q[i] if asking == 1 else torch.cat(q[i::count], 2)
            seen = (torch.cat([*x[i:first:count], *x[first : first + i + 1]], 2) for x in (k, v))
            out = attention(asked, *seen, mask).transpose(1, 2)
            for answer, part in zip(answers, out.split(sizes[i], 1), strict=True):
                answer.append(part)
        # in memory [B, T, H, D], as read next
        return torch.cat([part for answer in answers for part in answer], 1).transpose(1, 2)

    return attend


def flex(
    mask: AttentionMask, queries: int, keys: int, document_ids: Tensor | None, device: torch.device
) -> Attend:
    """FlexAttention: compiled on an accelerator; eager on a CPU, where it has no backward pass.
    Under the block-diffusion mask, the kernels of by_kernel.py where they can start."""
    from torch.nn.attention.flex_attention import flex_attention

    shared = document_ids is None and of_rows(mask) is None
    make = _shared_block_mask if shared else _block_mask
    block_mask = make(mask, queries, keys, document_ids, device)
    if device.type == "cpu":
        return lambda q, k, v: flex_attention(q, k, v, block_mask=block_mask, **_grouped(q, k))
    small = _has_little_shared_memory(device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tiles = _kernel_options(small, q.shape[-1], q.dtype)
        options = {"block_mask": block_mask, "kernel_options": tiles, **_grouped(q, k)}
        if torch.compiler.is_compiling():  # part of a larger graph
            return flex_attention(q, k, v, **options)
        for x in (q, k, v):  # a short last batch must not compile anew
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(flex_attention)(q, k, v, **options)

    if shared and isinstance(mask, BlockDiffusion):
        length = keys // (mask.views + 1)
        if length % mask.block_size == 0 and can_start(device):
            return ByKernel(length, mask.views, mask.block_size, mask.causal, attend)
    return attend


def _grouped(q: Tensor, k: Tensor) -> dict:
    return {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}


def _kernel_options(small: bool, head_width: int, dtype: torch.dtype) -> dict | None:
    """Tiles; None: torch's own choice.

    Never ROWS_GUARANTEED_SAFE, though every token sees itself: a tile in which a row sees nothing
    may come first, and the row is NaN from then on.
    """
    if small:
        return SMALL_TILES
    return LARGE_TILES if head_width == 64 and dtype.itemsize == 2 else None


@functools.cache
def _has_little_shared_memory(device: torch.device) -> bool:
    """GPUs with 99 KB of it per block (GeForce, L4, A10)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin < SHARED_MEMORY


def _block_mask(mask, queries, keys, document_ids, device):
    from torch.nn.attention.flex_attention import create_block_mask

    own, batch = of_rows(mask), None
    if own is not None:
        # of the mask the graph may read numbers alone, which are the same in every step
        name = "sizes" if isinstance(mask, BlockDiffusion) else "open"
        mask, batch = replace(mask, **{name: None}), len(own)
    if document_ids is not None:
        batch = len(document_ids)

    def allowed(b, h, q, k):
        at = (b,) if own is None or own.dim() == 1 else (b, q)
        seen = mask.allowed(q, k, keys, *(() if own is None else (own[at],)))
        return seen if document_ids is None else seen & (document_ids[b, q] == document_ids[b, k])

    return create_block_mask(allowed, batch, None, queries, keys, device=device)


# one per shape, as making one costs more than a layer; recordings of CUDA graphs read them
_shared_block_mask = functools.cache(_block_mask)


def flash_attn(
    mask: AttentionMask, queries: int, keys: int, document_ids: Tensor | None, device: torch.device
) -> Attend:
    """The flash-attn package: CUDA only, half precision, full or causal attention."""
    if document_ids is not None or not (isinstance(mask, Full) or mask == BlockCausal(1)):
        raise ValueError(
            f"model.attn_backend=flash_attn cannot apply {mask};"
            " use model.attn_backend=sdpa or flex"
        )
    try:  # where an export is loaded, transformers asks for every package imported outside a try
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise ImportError("model.attn_backend=flash_attn needs the package flash-attn") from error

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(q, k, v, causal=isinstance(mask, BlockCausal)).transpose(1, 2)

    return attend


@dataclass(frozen=True)
class Backend:
    """`prepare` and what it can do. settings/tables.py reads the keywords of an entry without
    importing torch: write them as literals."""

    prepare: Prepare
    block_masks: bool = True  # masks other than full and causal
    document_ids: bool = True
    cache: bool = True  # passes with a cache (models/cache.py)
    cpu: bool = True
    cpu_backward: bool = True
    full_precision: bool = True  # float32, not only half precision
    least_head_width: int = 1  # on a GPU
    package: str | None = None  # that it needs


BACKENDS = {
    "sdpa": Backend(sdpa),
    "flex": Backend(flex, cpu_backward=False, least_head_width=16),
    "flash_attn": Backend(
        flash_attn,
        block_masks=False,
        document_ids=False,
        cache=False,
        cpu=False,
        cpu_backward=False,
        full_precision=False,
        package="flash_attn",
    ),
}


def get_backend(name: str) -> Prepare:
    if name not in BACKENDS:
        raise ValueError(f"model.attn_backend must be one of {sorted(BACKENDS)}, got {name!r}")
    return BACKENDS[name].prepare
