"""Queries, keys and values from one product, rotated, in one kernel each way for CUDA.

Step by step the backward pass writes the gradients of all three twice: turned back, and put side by
side for the product. Here it writes them once.
"""

import torch
from torch import Tensor

from .starting import can_start, differentiated_by, operator

try:  # see decode.py
    import triton
    import triton.language as tl
except ImportError:
    triton = None

HEAD_WIDTHS = (16, 32, 64, 128, 256)
MOST_WIDTH = 2048
ROWS = 2  # of a program
WARPS = 4


def can_split(qkv: Tensor, heads: int) -> bool:
    """Whether `rotated_heads` can take qkv [B, T, 3 E], and is worth it: gradients are wanted."""
    return (
        torch.is_grad_enabled()
        and qkv.shape[-1] <= 3 * MOST_WIDTH
        and qkv.shape[-1] // 3 // heads in HEAD_WIDTHS
        and qkv.dtype.itemsize <= 4
        and can_start(qkv.device)
    )


def _keep(ctx, inputs, output) -> None:
    _, cos, sin, _ = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, d_q, d_k, d_v):
    return rotated_heads_backward(d_q, d_k, d_v, *ctx.saved_tensors), None, None, None


@differentiated_by(_gradients, _keep)
@operator(__name__, "rotated_heads", mutates_args=())
def rotated_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, 3 H D] -> q, k, v, each [B, T, H, D]; q and k turned as `rotate` does, in float32.
    cos, sin float32 [1 or B, 1, T, D/2] or [1, T, D/2]; they have no gradient."""
    qkv, cos, sin = (x.contiguous() for x in (qkv, cos, sin))
    batch, tokens, width = qkv.shape
    q, k, v = (qkv.new_empty(batch, tokens, heads, width // 3 // heads) for _ in range(3))
    _start(False, qkv, q, k, v, cos, sin)
    return q, k, v


@rotated_heads.register_fake
def _(qkv, cos, sin, heads):
    shape = *qkv.shape[:2], heads, qkv.shape[-1] // 3 // heads
    return qkv.new_empty(shape), qkv.new_empty(shape), qkv.new_empty(shape)


@operator(__name__, "rotated_heads_backward", mutates_args=())
def rotated_heads_backward(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient of qkv [B, T, 3 H D] from those of q, k and v [B, T, H, D], laid out anyhow."""
    d_q, d_k, d_v = (d if d.stride(-1) == 1 else d.contiguous() for d in (d_q, d_k, d_v))
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, tokens, heads, width = d_q.shape
    d_qkv = d_q.new_empty(batch, tokens, 3 * heads * width)
    _start(True, d_qkv, d_q, d_k, d_v, cos, sin)
    return d_qkv


@rotated_heads_backward.register_fake
def _(d_q, d_k, d_v, cos, sin):
    return d_q.new_empty(*d_q.shape[:2], 3 * d_q.shape[2] * d_q.shape[3])


def _start(back: bool, qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, cos, sin) -> None:
    batch, tokens, heads, width = q.shape
    with torch.cuda.device_of(qkv):
        _rotate[(batch * triton.cdiv(tokens, ROWS),)](
            qkv,
            q,
            *q.stride()[:3],
            k,
            *k.stride()[:3],
            v,
            *v.stride()[:3],
            cos,
            sin,
            0 if cos.numel() == tokens * width // 2 else tokens,
            tokens,
            HEADS=heads,
            HALF=width // 2,
            LANES=triton.next_power_of_2(heads * width // 2),
            BACK=back,
            ROWS=ROWS,
            num_warps=WARPS,
        )


if triton is not None:

    @triton.jit(do_not_specialize=["tokens", "angle_rows"])
    def _rotate(
        qkv,
        q,
        q_sample,
        q_token,
        q_head,
        k,
        k_sample,
        k_token,
        k_head,
        v,
        v_sample,
        v_token,
        v_head,
        cos,
        sin,
        angle_rows,
        tokens,
        HEADS: tl.constexpr,
        HALF: tl.constexpr,
        LANES: tl.constexpr,
        BACK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """From qkv to q, k and v, or BACK, by the angles turned round."""
        parts = tl.cdiv(tokens, ROWS)
        sample = (tl.program_id(0) // parts).to(tl.int64)
        row = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
        lane = tl.arange(0, LANES)
        head, at = lane // HALF, lane % HALF
        mask = (row < tokens)[:, None] & (lane < HEADS * HALF)[None, :]
        angle = (sample * angle_rows + row)[:, None] * HALF + at[None, :]
        c = tl.load(cos + angle, mask=mask, other=0)
        s = tl.load(sin + angle, mask=mask, other=0)
        whole = (sample * tokens + row)[:, None] * (6 * HEADS * HALF)
        whole += (head * 2 * HALF + at)[None, :]
        for part in tl.static_range(3):
            if part == 0:
                own = q + sample * q_sample + row[:, None] * q_token + head[None, :] * q_head
            elif part == 1:
                own = k + sample * k_sample + row[:, None] * k_token + head[None, :] * k_head
            else:
                own = v + sample * v_sample + row[:, None] * v_token + head[None, :] * v_head
            own += at[None, :]
            side = qkv + whole + part * 2 * HEADS * HALF
            if BACK:
                a, b = tl.load(own, mask=mask, other=0), tl.load(own + HALF, mask=mask, other=0)
            else:
                a, b = tl.load(side, mask=mask, other=0), tl.load(side + HALF, mask=mask, other=0)
            if part < 2:
                x, z = a.to(tl.float32), b.to(tl.float32)
                if BACK:
                    a, b = (x * c + z * s).to(a.dtype), (z * c - x * s).to(b.dtype)
                else:
                    a, b = (x * c - z * s).to(a.dtype), (z * c + x * s).to(b.dtype)
            if BACK:
                tl.store(side, a, mask=mask)
                tl.store(side + HALF, b, mask=mask)
            else:
                tl.store(own, a, mask=mask)
                tl.store(own + HALF, b, mask=mask)
