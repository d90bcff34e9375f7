"""The kernels of block-diffusion attention against the mask itself, all pairs at once."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from networks import small, small_llama, texts
from test_training_kernels import REGISTERED, assert_alike, leaf

from models import attention
from models.attention import dense, flex
from models.by_kernel import ByKernel
from models.clean_half import clean_half
from models.kernels import block_diffusion as kernels
from models.kernels import heads
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
    (1, 2, 1, 16, 36, 12, 1, 2, False),  # a size that is no power of two
    (2, 1, 1, 16, 129, 3, 1, 1, True),
    (1, 1, 1, 16, 160, 1, 1, 2, False),  # blocks of one
    (1, 1, 1, 16, 256, 128, 1, 2, False),  # a block of several tiles
]
LARGE = [
    (2, 3, 3, 64, 1024, 16, 1, 2, False),
    (65_536, 2, 2, 16, 1, 1, 1, 2, False),  # more than a second axis of a grid has
    (1, 2, 1, 128, 520, 8, 1, 2, False),
    (1, 2, 2, 128, 256, 64, 2, 2, True),
]


def strided(x):
    """The same numbers, apart in memory: heads before tokens, inside something wider."""
    batch, tokens, heads, width = x.shape
    wider = x.new_zeros(batch, heads, tokens + 1, width + 8)
    wider[:, :, 1:, 3 : width + 3] = x.detach().transpose(1, 2)
    return wider.requires_grad_()[:, :, 1:, 3 : width + 3].transpose(1, 2)


def check(device, dtype, tolerance, cases, strided_too=False):
    torch.manual_seed(0)
    for case in cases:
        batch, count, kept, width, length, size, views, asking, causal = case
        options = {"device": device, "dtype": dtype}
        q = leaf(batch, asking * length, count, width, **options)
        k, v = (leaf(batch, (views + 1) * length, kept, width, **options) for _ in range(2))
        if strided_too:  # each its own way
            q, v = strided(q), strided(v).transpose(-1, -2).contiguous().transpose(-1, -2)
        found, logs = kernels.block_diffusion(q, k, v, length, views, size, causal)
        attend = dense(
            BlockDiffusion(size, views=views, causal=causal), q.shape[1], k.shape[1], None, q.device
        )
        wide = (x.double().transpose(1, 2) for x in (q, k, v))
        assert logs.shape == (batch, count, q.shape[1])
        wanted = attend(*wide).transpose(1, 2)
        # where a text is one token its answer is its value, and q and k have no gradient
        inputs = [v] if length == 1 else [q, k, v]
        assert_alike([found], [wanted], inputs, tolerance)


def check_rotated(device, dtype, tolerance, widths=(32,)):
    """Turned back and written side by side: the gradient that two steps give."""
    torch.manual_seed(0)
    count, length = 2, 48
    for width, (views, causal), shared in itertools.product(
        widths, ((1, False), (2, True)), (True, False)
    ):
        tokens, mask = (views + 1) * length, (length, views, 16, causal)
        qkv = leaf(2, tokens, 3 * count * width, device=device, dtype=dtype)
        shape = (tokens,) if shared else (2, tokens)
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
    assert all(len(x) == 0 for x in made(slice(0)))


def check_operators(device, dtype):
    options, mask = {"device": device, "dtype": dtype}, (16, 1, 4, False)
    cos, sin = Rotary(16).to(device)(torch.arange(32, device=device))
    qkv, parts = leaf(2, 32, 96, **options), [leaf(2, 32, 2, 16, **options) for _ in range(3)]
    for operator, arguments in (
        (kernels.block_diffusion, (*parts, *mask)),
        (kernels.rotated_block_diffusion, (qkv, cos, sin, 2, *mask)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=REGISTERED)


KINDS = {"bf16": (torch.bfloat16, 5e-3), "fp16": (torch.float16, 1e-3)}


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(CASES + LARGE)))
def test_the_kernels_are_the_mask(cuda, number):
    """Each in its own test, as it compiles kernels of its own."""
    check(cuda, *KINDS["bf16"], [(CASES + LARGE)[number]], strided_too=number % 2 == 1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_repeat_themselves_and_turn_back(cuda, kind):
    dtype, tolerance = KINDS[kind]
    check(cuda, dtype, tolerance, CASES[:1], strided_too=True)
    check_rotated(cuda, dtype, tolerance, (32, 128))
    check_bits(cuda, dtype)
    check_operators(cuda, dtype)


BY_THE_INTERPRETER = """
import torch, test_block_diffusion as t
half = torch.float16
t.check("cpu", half, 1e-3, t.CASES)
t.check("cpu", half, 1e-3, t.CASES[1::3], strided_too=True)
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


def check_network(cuda, monkeypatch, make, mask, asked, *, compiled=False):
    """With the kernels a network is what it is with FlexAttention, in bf16, and so are its
    gradients. asked: which operators one pass calls, and how often."""
    tokens, found, called = texts(2, 32 * (mask.views + 1), 6).to(cuda), [], []
    for name in ("block_diffusion", "rotated_block_diffusion"):
        real = getattr(kernels, name)

        def counted(*arguments, name=name, real=real):
            called.append(name)
            return real(*arguments)

        monkeypatch.setattr(f"models.by_kernel.{name}", counted)
    for able in (True, False):
        if not able:
            monkeypatch.setattr("models.by_kernel.can_attend", lambda *_: False)
        net = make(attn_backend="flex", compile=compiled and able).to(cuda).train()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = net.hidden(tokens, attention_mask=mask)
        hidden.square().sum().backward()
        found.append([hidden, *(p.grad for p in net.parameters() if p.grad is not None)])
    if not compiled:  # what is compiled calls them once for all layers, when it is traced
        assert sorted(called) == sorted(asked)
    assert called
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


def dit(**options):
    return small(hidden_size=64, n_blocks=3, **options)


def llama(**options):
    """Two heads of queries share one of keys."""
    return small_llama(hidden_size=64, head_dim=16, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("both", [True, False])
def test_a_network_with_the_kernels_is_the_network(cuda, monkeypatch, views, both):
    asked = ["rotated_block_diffusion"] * (2 + both) + ["block_diffusion"] * (not both)
    check_network(cuda, monkeypatch, dit, BlockDiffusion(4, views=views, both=both), asked)


@pytest.mark.gpu
def test_a_compiled_network_with_the_kernels_is_the_network(cuda, monkeypatch):
    check_network(cuda, monkeypatch, dit, BlockDiffusion(4), [], compiled=True)


@pytest.mark.gpu
def test_a_llama_with_the_kernels_is_the_network(cuda, monkeypatch):
    layers = len(llama().blocks)
    mask = BlockDiffusion(4, causal=True)
    check_network(cuda, monkeypatch, llama, mask, ["block_diffusion"] * layers)


@pytest.mark.gpu
def test_a_clean_half_made_once_is_asked_by_the_kernels(cuda, monkeypatch):
    """What every noised version of a text is asked is what both halves together answer."""
    tokens, net = texts(2, 64, 6).to(cuda), dit(attn_backend="flex").to(cuda)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        wanted = net.hidden(tokens, attention_mask=BlockDiffusion(4))
        made = clean_half(net, tokens[:, 32:], 4, torch.bfloat16)
        own = Called(None, kernels.block_diffusion)
        monkeypatch.setattr("models.by_kernel.block_diffusion", own)
        found = net.hidden(tokens[:, :32], attention_mask=BlockDiffusion(4), cache=made)
    assert len(own.asked) == len(net.blocks)
    assert (found - wanted).norm() <= 2e-2 * wanted.norm()


class Called:
    """Stands for a function; keeps what it was asked. `real` answers, else it is `answer`."""

    def __init__(self, answer, real=None):
        self.answer, self.real, self.asked = answer, real, []

    def __call__(self, *asked):
        self.asked.append(asked)
        return self.answer if self.real is None else self.real(*asked)


@pytest.mark.parametrize(
    ("dtype", "width", "tokens", "taken"),
    [
        (torch.bfloat16, 64, 64, True),
        (torch.float16, 128, 64, True),
        (torch.float32, 64, 64, False),
        (torch.bfloat16, 24, 64, False),
        (torch.bfloat16, 256, 64, False),
        (torch.bfloat16, 128, 2**31 // 768 + 2, False),  # places that int32 cannot count
    ],
)
def test_what_the_kernels_take(monkeypatch, dtype, width, tokens, taken):
    assert kernels.can_attend(dtype, 2, width, tokens) == taken
    q = torch.zeros(1, 8, 2, width, dtype=dtype)
    own, other = Called((q, None)), Called(q.transpose(1, 2))
    monkeypatch.setattr("models.by_kernel.block_diffusion", own)
    attend = ByKernel(tokens // 2, 1, 4, False, other)
    assert attend(*(q.transpose(1, 2),) * 3).shape == (1, 2, 8, width)
    assert [len(own.asked), len(other.asked)] == [taken, not taken]


def test_flexattention_has_them_where_they_can_be(monkeypatch):
    """Under its own mask alone, where all rows have the same, of whole blocks."""
    for name in ("_has_little_shared_memory", "_shared_block_mask", "_block_mask"):
        monkeypatch.setattr(attention, name, lambda *_: None)
    gpu, mask = torch.device("cuda"), BlockDiffusion(4, views=2, causal=True)
    monkeypatch.setattr(attention, "can_start", lambda device: False)
    assert not isinstance(flex(mask, 96, 96, None, gpu), ByKernel)
    monkeypatch.setattr(attention, "can_start", lambda device: device == gpu)
    made = flex(mask, 96, 96, None, gpu)
    assert (made.length, made.views, made.block_size, made.causal) == (32, 2, 4, True)
    sizes = BlockDiffusion(4, sizes=torch.tensor([2, 4]))
    ids = torch.zeros(1, 64, dtype=torch.int64)
    plain = BlockDiffusion(4)
    for other, keys, documents in ((sizes, 64, None), (plain, 64, ids), (plain, 68, None)):
        assert not isinstance(flex(other, keys, keys, documents, gpu), ByKernel)
