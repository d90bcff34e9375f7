"""The products of a block for a few rows: each is what block.py does in several steps."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from networks import assert_within, small, texts

from models import block as block_module
from models.kernels import few_rows
from models.lora import Adapter, adapt
from models.masks import BlockCausal

# rows as [B, T], width: one row, a tile and less, several tiles; widths that fill no warp
SHAPES = [((1, 1), 64), ((2, 3), 32), ((1, 16), 72), ((3, 16), 32), ((1, 5), 264)]


def normed_product(x, norm, modulation, part, weight, bias, gelu):
    """In float32, but for the rounding ahead of the product."""
    y = F.layer_norm(x, norm.shape, norm)
    if modulation is not None:
        shift, scale = modulation.flatten().float().chunk(6)[3 * part : 3 * part + 2]
        y = shift + y * (1 + scale)
    bias = None if bias is None else bias.float()
    y = F.linear(y.to(weight.dtype).float(), weight.float(), bias)
    return (F.gelu(y, approximate="tanh") if gelu else y).to(weight.dtype)


def added_product(x, a, modulation, part, weight, bias, read):
    y = F.linear(a.float(), weight.float(), None if bias is None else bias.float())
    if modulation is not None:
        y = y * modulation.flatten().float().chunk(6)[3 * part + 2]
    y = x + y
    return y if read is None else y.flatten(0, -2)[read]


def cases(shape, width, dtype, device):
    """(arguments of normed_product, of added_product) as the two halves of a block call them, with
    modulation and without."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, by=1.0, dtype=dtype):
        return (torch.randn(shape, generator=generator) * by).to(device, dtype)

    x, norm = random(*shape, width, by=3.0, dtype=torch.float32) + 1, random(width) + 1
    read = torch.randperm(shape[0] * shape[1], generator=generator)[:3].to(device)
    for modulation in (random(1, 1, 6 * width, by=0.3), None):
        for part, inside in enumerate((width, 4 * width)):
            into = random((3 + part) * width, width, by=width**-0.5)
            back = random(width, inside, by=inside**-0.5)
            bias = (random(len(into)), random(width)) if part else (None, None)
            yield (
                (x, norm.float(), modulation, part, into, bias[0], bool(part)),
                (x, random(*shape, inside), modulation, part, back, bias[1], None),
                (x, random(*shape, inside), modulation, part, back, bias[1], read),
            )


def compare(shape, width, dtype, device, tolerance):
    with torch.inference_mode():
        for first, *others in cases(shape, width, dtype, device):
            found = few_rows.normed_product(*first)
            assert found.dtype == dtype
            assert_within(found.float(), normed_product(*first).float(), tolerance, "normed")
            for given in others:
                found = few_rows.added_product(*given)
                assert found.dtype == torch.float32  # the residual stream is never rounded
                assert_within(found, added_product(*given), 1e-5, "added")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_the_kernels_are_the_steps(cuda, dtype, tolerance):
    for shape, width in [*SHAPES, ((1, 33), 768)]:
        compare(shape, width, dtype, cuda, tolerance)


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_rows_beside_it(cuda):
    """Nor on when the kernels run: the same bits every time."""
    with torch.inference_mode():
        for first, second, _ in cases((4, 16), 768, torch.bfloat16, cuda):
            x, a = first[0], second[1]
            normed = few_rows.normed_product(*first)
            added = few_rows.added_product(*second)
            for row in range(4):
                alone = few_rows.normed_product(x[row : row + 1], *first[1:])
                assert torch.equal(alone, normed[row : row + 1])
                alone = few_rows.added_product(x[row : row + 1], a[row : row + 1], *second[2:])
                assert torch.equal(alone, added[row : row + 1])


BY_THE_INTERPRETER = """
import torch, test_few_rows as t
for shape, width in t.SHAPES:
    t.compare(shape, width, torch.float32, "cpu", 1e-5)
t.compare((2, 3), 64, torch.float16, "cpu", 2e-3)
"""


def test_the_kernels_are_the_steps_by_tritons_interpreter():
    """On a CPU: it makes numpy of the kernels. bfloat16 is for a GPU."""
    pytest.importorskip("triton", reason="pip install triton, to run the kernels on a CPU")
    paths = os.pathsep.join([".", "tests", *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", BY_THE_INTERPRETER], env=environment, check=True)


class Attends:
    """What `Decode` is asked in a block, without a kernel: every token sees itself."""

    def __call__(self, qkv, cos, sin):
        return qkv.chunk(3, -1)[2]


@pytest.fixture
def stand_in(monkeypatch):
    """The steps in the place of the kernels, on any device; yields how many rows were asked."""
    calls = []

    def counted(x, *arguments):
        calls.append(x.numel() // x.shape[-1])
        return normed_product(x, *arguments)

    monkeypatch.setattr(block_module, "Decode", Attends)
    monkeypatch.setattr(block_module, "normed_product", counted)
    monkeypatch.setattr(block_module, "added_product", added_product)
    return calls


def answered(block, x, c=None, read=None):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return block(x, c, Attends(), None, None, x.shape[1], read)


@pytest.mark.parametrize("adaln", [True, False], ids=["modulated", "plain"])
@pytest.mark.parametrize("read", [None, torch.tensor([5, 0, 2])], ids=["all", "read"])
def test_a_block_with_the_kernels_is_the_block(stand_in, adaln, read):
    net = small(adaln=adaln)
    net.freeze(torch.bfloat16)
    block, x = net.blocks[0], torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    found = answered(block, x, read=read)
    assert stand_in == [16, 16 if read is None else 3]
    block.few_rows = False
    assert_within(found, answered(block, x, read=read), 2**-7)
    assert len(stand_in) == 2


def test_who_gets_the_kernels(stand_in):
    """A frozen network in half precision, at sigma 0, for a few rows."""
    net, x = small(), torch.randn(2, 8, 16)
    c = torch.zeros(1, 8)
    answered(net.blocks[0], x, c)  # not frozen
    exact = copy.deepcopy(net)
    exact.freeze(torch.float32)
    answered(exact.blocks[0], x)
    net.freeze(torch.bfloat16)
    many = few_rows.MOST_ROWS // 2 + 1
    answered(net.blocks[0], torch.randn(2, many, 16))
    answered(net.blocks[0], x, c)  # a noise level
    net.train()
    answered(net.blocks[0], x)
    assert not stand_in
    net.eval()
    answered(net.blocks[0], torch.randn(2, many - 1, 16))
    assert stand_in


def test_an_adapter_is_not_left_out(stand_in):
    net = small()
    adapt(net, Adapter(rank=2, alpha=4.0))
    net.freeze(torch.bfloat16)
    answered(net.blocks[0], torch.randn(2, 8, 16))
    assert not stand_in


def linear(inputs, outputs=64, dtype=torch.bfloat16):
    return torch.nn.Linear(inputs, outputs, dtype=dtype)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([linear(64), linear(256)], True),
        ([linear(few_rows.MOST_WIDTH), linear(few_rows.MOST_INSIDE)], True),
        ([linear(few_rows.MOST_WIDTH + 8), linear(64)], False),
        ([linear(64), linear(few_rows.MOST_INSIDE + 8)], False),
        ([linear(60), linear(64)], False),
        ([linear(64), linear(64, dtype=torch.float32)], False),
    ],
    ids=["small", "largest", "wide", "wide inside", "60", "float32"],
)
def test_what_the_kernels_take(layers, expected):
    assert few_rows.takes(*layers) == expected


@pytest.mark.gpu
@torch.no_grad()
def test_a_frozen_network_with_the_kernels_is_as_exact_as_without(cuda):
    net, tokens = small(hidden_size=64).to(cuda), texts(2, 32, 7).to(cuda)
    exact = net.hidden(tokens, attention_mask=BlockCausal(8)).float()
    net.freeze(torch.bfloat16)
    answers = []
    for fused in (True, False):
        for block in net.blocks:
            assert block.few_rows or not fused
            block.few_rows = fused
        cache, found = net.new_cache(2, 32, 8, dtype=torch.bfloat16), []
        for start in range(0, 32, 8):
            with torch.autocast("cuda", torch.bfloat16):
                part = tokens[:, start : start + 8]
                found.append(net.hidden(part, attention_mask=cache.attention_mask, cache=cache))
            cache = cache.commit(8)
        answers.append(torch.cat(found, 1))
    ours, plain = answers
    assert_within(ours, plain, 2**-5)
    assert (ours - exact).square().mean() < 1.2 * (plain - exact).square().mean()
