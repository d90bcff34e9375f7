"""The kernels of block-diffusion attention against the mask itself, all pairs at once."""

import os
import subprocess
import sys

import pytest
import torch
from networks import small, texts
from test_training_kernels import REGISTERED, assert_alike, leaf

from models.attention import dense, flex
from models.by_kernel import ByKernel
from models.kernels import block_diffusion as kernels
from models.kernels import heads, starting
from models.layers import Rotary
from models.masks import BlockDiffusion

# of a sample, heads, those of keys, head width, length, block size, views, parts that ask, causal
CASES = [
    (1, 2, 2, 16, 64, 16, 1, 2, False),
    (2, 2, 1, 16, 64, 16, 1, 1, False),  # two heads of queries share keys; the last layer
    (1, 2, 2, 16, 72, 4, 1, 2, True),  # tiles that end behind the text
    (1, 2, 2, 32, 48, 16, 2, 3, False),
    (1, 4, 2, 32, 48, 16, 2, 2, True),
    (1, 1, 1, 16, 33, 33, 1, 2, False),  # one block
    (1, 1, 1, 16, 160, 1, 1, 2, False),  # blocks of one
    (1, 1, 1, 16, 256, 128, 1, 2, False),  # a block of several tiles
]
LARGE = [
    (2, 3, 3, 64, 1024, 16, 1, 2, False),
    (1, 2, 1, 128, 520, 8, 1, 2, False),
    (1, 2, 2, 128, 256, 64, 2, 2, True),
]


def check(device, dtype, tolerance, cases):
    torch.manual_seed(0)
    for case in cases:
        batch, count, kept, width, length, size, views, asking, causal = case
        options = {"device": device, "dtype": dtype}
        q = leaf(batch, asking * length, count, width, **options)
        k, v = (leaf(batch, (views + 1) * length, kept, width, **options) for _ in range(2))
        found, logs = kernels.block_diffusion(q, k, v, length, views, size, causal)
        attend = dense(
            BlockDiffusion(size, views=views, causal=causal), q.shape[1], k.shape[1], None, q.device
        )
        wide = (x.double().transpose(1, 2) for x in (q, k, v))
        assert logs.shape == (batch, count, q.shape[1])
        assert_alike([found], [attend(*wide).transpose(1, 2)], [q, k, v], tolerance)


def check_rotated(device, dtype, tolerance):
    """Turned back and written side by side: the gradient that two steps give."""
    torch.manual_seed(0)
    count, width, length, mask = 2, 32, 48, (48, 1, 16, False)
    for shared in (True, False):
        qkv = leaf(2, 2 * length, 3 * count * width, device=device, dtype=dtype)
        shape = (2 * length,) if shared else (2, 2 * length)
        cos, sin = Rotary(width).to(device)(torch.randint(0, 500, shape).to(device))
        found = kernels.rotated_block_diffusion(qkv, cos, sin, count, *mask)[0]
        wanted = kernels.block_diffusion(*heads.rotated_heads(qkv, cos, sin, count), *mask)[0]
        assert torch.equal(found, wanted)
        d = torch.randn_like(found)
        ours, theirs = (torch.autograd.grad(x, qkv, d)[0].double() for x in (found, wanted))
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def check_bits(device, dtype):
    """The same bits again, and for a sample by itself: nothing is added up in another order."""
    torch.manual_seed(0)
    q, k, v = (leaf(3, 96, 2, 16, device=device, dtype=dtype) for _ in range(3))
    d = torch.randn(3, 96, 2, 16, device=device).to(dtype)

    def made(rows):
        out = kernels.block_diffusion(q[rows], k[rows], v[rows], 48, 1, 16, False)[0]
        return out, *(x[rows] for x in torch.autograd.grad(out, (q, k, v), d[rows]))

    whole = made(slice(None))
    for a, b in zip(whole, made(slice(None)), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole, made(slice(1, 2)), strict=True):
        assert torch.equal(a[1:2], b)


def check_operators(device, dtype):
    options, mask = {"device": device, "dtype": dtype}, (16, 1, 4, False)
    cos, sin = Rotary(16).to(device)(torch.arange(32, device=device))
    qkv, parts = leaf(2, 32, 96, **options), [leaf(2, 32, 2, 16, **options) for _ in range(3)]
    for operator, arguments in (
        (kernels.block_diffusion, (*parts, *mask)),
        (kernels.rotated_block_diffusion, (qkv, cos, sin, 2, *mask)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=REGISTERED)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)], ids=["bf16", "fp16"]
)
def test_the_kernels_are_the_mask(cuda, dtype, tolerance):
    check(cuda, dtype, tolerance, CASES + LARGE)
    check_rotated(cuda, dtype, tolerance)
    check_bits(cuda, dtype)
    check_operators(cuda, dtype)


BY_THE_INTERPRETER = """
import torch, test_block_diffusion as t
half = torch.float16
t.check("cpu", half, 1e-3, t.CASES)
t.check_rotated("cpu", half, 1e-3)
t.check_bits("cpu", half)
t.check_operators("cpu", half)
"""


def test_the_kernels_are_the_mask_by_tritons_interpreter():
    """On a CPU: it makes numpy of the kernels, which has no bfloat16."""
    pytest.importorskip("triton", reason="pip install triton, to run the kernels on a CPU")
    paths = os.pathsep.join([".", "tests", "tests/models", *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", BY_THE_INTERPRETER], env=environment, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("both", [True, False])
def test_a_network_with_the_kernels_is_the_network(cuda, monkeypatch, views, both):
    """In half precision; the other way is FlexAttention, and its gradients."""
    tokens = texts(2, 32 * (views + 1), 6).to(cuda)
    mask, found = BlockDiffusion(4, views=views, both=both), []
    for able in (True, False):
        if not able:
            monkeypatch.setattr("models.by_kernel.can_attend", lambda *_: False)
        net = small(hidden_size=64, n_blocks=3, attn_backend="flex").to(cuda).train()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = net.hidden(tokens, attention_mask=mask)
        hidden.square().sum().backward()
        found.append([hidden, *(p.grad for p in net.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


class Called:
    """Stands for the kernels; keeps what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, *asked):
        self.asked.append(asked)
        return self.answer


@pytest.mark.parametrize(
    ("dtype", "width", "length", "taken"),
    [
        (torch.bfloat16, 64, 32, True),
        (torch.float16, 128, 32, True),
        (torch.float32, 64, 32, False),
        (torch.bfloat16, 24, 32, False),
        (torch.bfloat16, 256, 32, False),
        (torch.bfloat16, 64, 34, False),  # no whole number of blocks
    ],
)
def test_what_the_kernels_take(monkeypatch, dtype, width, length, taken):
    monkeypatch.setattr(starting, "triton", object())
    monkeypatch.setattr(starting, "_can_start", lambda device: True)
    q = torch.zeros(1, length, 2, width, dtype=dtype)
    assert not kernels.can_attend(q, length, 4)  # no GPU
    monkeypatch.setattr(kernels, "can_start", lambda device: True)
    assert kernels.can_attend(q, length, 4) == taken
    own, other = Called((q, None)), Called(q.transpose(1, 2))
    monkeypatch.setattr("models.by_kernel.block_diffusion", own)
    attend = ByKernel(length, 1, 4, False, other)
    assert attend(*(q.transpose(1, 2),) * 3).shape == (1, 2, length, width)
    assert [len(own.asked), len(other.asked)] == [taken, not taken]


def test_flexattention_has_them_where_they_can_be(monkeypatch):
    """Under its own mask alone, and where all rows have the same."""
    monkeypatch.setattr("models.attention._has_little_shared_memory", lambda device: False)
    monkeypatch.setattr("models.attention._shared_block_mask", lambda *_: None)
    monkeypatch.setattr("models.attention._block_mask", lambda *_: None)
    gpu, mask = torch.device("cuda"), BlockDiffusion(4, views=2, causal=True)
    made = flex(mask, 96, 96, None, gpu)
    assert (made.length, made.views, made.block_size, made.causal) == (32, 2, 4, True)
    sizes = BlockDiffusion(4, sizes=torch.tensor([2, 4]))
    ids = torch.zeros(1, 64, dtype=torch.int64)
    for other, documents in ((sizes, None), (BlockDiffusion(4), ids)):
        assert not isinstance(flex(other, 64, 64, documents, gpu), ByKernel)
