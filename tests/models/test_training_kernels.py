"""The kernels of a training step against the same in plain operators."""

import importlib
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import GRADIENTS, LOGITS, small, texts

from models import block
from models.kernels import cross_entropy, heads, mlp, residual, starting
from models.layers import Rotary, rotate
from models.masks import BlockDiffusion, Full
from objectives import head

ROOT = Path(__file__).resolve().parents[2]
KINDS = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
P = 0.3


def leaf(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(shape).to(device, dtype).requires_grad_()


def assert_alike(found, wanted, inputs, tolerance):
    """Outputs and the gradients of inputs, by the norm of each. wanted: in float64."""
    d = [torch.randn(out.shape, device=out.device).to(out.dtype) for out in found]
    ours = torch.autograd.grad(found, inputs, d)
    theirs = torch.autograd.grad(wanted, inputs, [x.double() for x in d])
    for a, b in zip((*found, *ours), (*wanted, *theirs), strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm() + 1e-30


def what_is_kept(x, seed):
    """1 where dropout keeps a number, else 0."""
    nothing, ones = torch.zeros_like(x), torch.ones_like(x)
    total, *_ = residual.residual(nothing, ones, None, seed, P, None, None, None, x.dtype)
    return (total != 0).double().detach()


def check_residual(device, dtype, tolerance, shapes=((3, 37, 48), (1, 8, 64))):
    torch.manual_seed(0)
    for shape, (add, gated, drop, norm, modulated, shared) in itertools.product(
        shapes, itertools.product((False, True), repeat=6)
    ):
        if not (add or norm) or ((gated or drop) and not add) or (modulated and not norm):
            continue
        width, options = shape[-1], {"device": device, "dtype": dtype}
        x = leaf(*shape, device=device)  # the residual stream is wide
        y = leaf(*shape, **options) if add else None
        parts = leaf(1 if shared else shape[0], 1, 3 * width, **options)
        gate, shift, scale = parts.chunk(3, -1)
        gate = gate if gated else None
        shift, scale = (shift, scale) if modulated else (None, None)
        weight = leaf(width, device=device) if norm else None
        seed = residual.new_seed(x.device) if drop else None
        found = residual.residual(x, y, gate, seed, P, weight, shift, scale, dtype)
        wanted = x.double()
        if add:
            kept = what_is_kept(x, seed) / (1 - P) if drop else 1
            wanted = wanted + kept * y.double() * (gate.double() if gated else 1)
        wanted = [wanted]
        if norm:
            normed = F.layer_norm(wanted[0], (width,)) * weight.double()
            if modulated:
                normed = normed * (1 + scale.double()) + shift.double()
            wanted.append(normed)
        inputs = [x, y, parts if gated or modulated else None, weight]
        inputs = [each for each in inputs if each is not None]
        assert_alike(found[: len(wanted)], wanted, inputs, tolerance)


def check_dropout(device):
    """Each number is dropped with chance P, whatever its place and what happens beside it."""
    torch.manual_seed(0)
    x = torch.zeros(2, 64, 96, device=device)
    drawn = [what_is_kept(x, residual.new_seed(x.device)) for _ in range(4)]
    count = x.numel()
    spread = 5 * (P * (1 - P) / count) ** 0.5
    for kept in drawn:
        assert abs(kept.mean() - (1 - P)) < spread
        for dim in (1, 2):  # places beside each other
            both = (kept * kept.roll(1, dim)).mean()
            assert abs(both - (1 - P) ** 2) < 2 * spread
    for one, other in itertools.combinations(drawn, 2):
        assert abs((one * other).mean() - (1 - P) ** 2) < 2 * spread


REGISTERED = ("test_schema", "test_autograd_registration", "test_faketensor")


def check_operators(device):
    """What the compiler is told of them is what they do."""
    x, y, weight, gate = (
        leaf(*shape, device=device) for shape in ((2, 5, 8),) * 2 + ((8,), (2, 1, 8))
    )
    seed, wide = residual.new_seed(x.device), torch.float32
    cos, sin = Rotary(16).to(device)(torch.arange(5, device=device))
    shapes = (3, 4, 24), (96, 24), (96,), (24, 96), (24,)
    for operator, arguments in (
        (residual.residual, (x, y, gate, seed, P, weight, gate, gate, wide)),
        (residual.residual, (x, None, None, None, 0.0, weight, None, None, wide)),
        (residual.residual, (x, y, None, None, 0.0, None, None, None, wide)),
        (heads.rotated_heads, (leaf(2, 5, 96, device=device), cos, sin, 2)),
        (mlp.mlp, tuple(leaf(*shape, device=device) for shape in shapes)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=REGISTERED)


def check_edges(device):
    """Gradients that are not there, a step in which nothing counts, and a dropout of all."""
    x, y, weight = (leaf(*shape, device=device) for shape in ((2, 5, 8), (2, 5, 8), (8,)))
    without = None, None, 0.0
    total, normed, _ = residual.residual(x, y, *without, weight, None, None, torch.float32)
    wanted = F.layer_norm(x + y, (8,), weight)
    for ours, theirs in ((total, x + y), (normed, wanted)):
        found = torch.autograd.grad(ours.square().sum(), x, retain_graph=True)[0]
        expected = torch.autograd.grad(theirs.square().sum(), x)[0]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    seed = residual.new_seed(x.device)
    assert torch.equal(residual.residual(x, y, None, seed, 1.0, *(None,) * 3, x.dtype)[0], x)
    shapes = (0, 24), (96, 24), (96,), (24, 96), (24,)
    inputs = [leaf(*shape, device=device) for shape in shapes]
    out, _ = mlp.mlp(*inputs)
    assert out.shape == (0, 24)
    assert not any(d.any() for d in torch.autograd.grad(out.sum(), inputs))


def check_heads(device, dtype, tolerance):
    torch.manual_seed(0)
    for batch, tokens, count, width, shared in ((2, 13, 3, 32, True), (3, 8, 2, 16, False)):
        qkv = leaf(batch, tokens, 3 * count * width, device=device, dtype=dtype)
        positions = torch.randint(0, 500, (tokens,) if shared else (batch, tokens))
        cos, sin = Rotary(width).to(device)(positions.to(device))
        found = [x.transpose(1, 2) for x in heads.rotated_heads(qkv, cos, sin, count)]
        wide = qkv.double().unflatten(-1, (3, count, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(wide[:2], cos.double(), sin.double()).unbind()
        assert_alike(found, [q, k, wide[2]], [qkv], tolerance)


def check_mlp(device, dtype, tolerance):
    torch.manual_seed(0)
    options = {"device": device, "dtype": dtype}
    for shape in ((2, 70, 24), (13, 24), (1, 1, 24)):
        x, bias = leaf(*shape, **options), leaf(600, device=device)
        weight, weight2, bias2 = leaf(600, 24, **options), leaf(24, 600, **options), leaf(24)
        bias2 = bias2.detach().to(**options).requires_grad_()
        found = mlp.mlp(x, weight, bias, weight2, bias2)[:1]
        inner = F.linear(x.double(), weight.double(), bias.double())
        inner = F.gelu(inner, approximate="tanh")
        wanted = [F.linear(inner, weight2.double(), bias2.double())]
        assert_alike(found, wanted, [x, weight, bias, weight2, bias2], tolerance)


def check_cross_entropy(device, dtype, tolerance):
    torch.manual_seed(0)
    for vocabulary in (5, 37, 9000):
        wide = (torch.randn(7, vocabulary + 3) * 8).to(device, dtype)
        wide[2] *= 20  # nearly certain
        wide[3, 1] = -torch.inf
        target = torch.randint(2, vocabulary - 1, (7,), device=device)
        ours, theirs, read = wide.clone(), wide.clone().float(), wide.clone()
        mask_id = vocabulary - 1
        take = cross_entropy.cross_entropy_in_place
        losses = take(ours[:, :vocabulary], target, True, mask_id=mask_id)
        wanted = head.cross_entropy(theirs[:, :vocabulary], target, True, mask_id=mask_id)
        assert torch.allclose(losses, wanted, rtol=1e-5, atol=1e-5)
        gap = (ours.float() - theirs)[:, :vocabulary].norm(dim=1)
        assert (gap <= tolerance * theirs[:, :vocabulary].norm(dim=1) + 1e-6).all()
        assert torch.equal(ours[:, vocabulary:], wide[:, vocabulary:])  # beside the vocabulary
        again = take(read[:, :vocabulary], target, False, mask_id=mask_id)
        assert torch.equal(again, losses)
        assert torch.equal(read, wide)
    for bad in (torch.nan, torch.inf):
        broken = torch.randn(2, 37, device=device, dtype=dtype)
        broken[:, 5] = bad
        target = torch.tensor([1, 2], device=device)
        assert not take(broken, target, True, mask_id=36).isfinite().any()


def check_head(device, dtype, tolerance, monkeypatch):
    """The loss and gradients of logits in several chunks, against the CPU's."""
    monkeypatch.setattr(head, "CHUNK_LOGITS_ACCELERATOR", 64 * 1000)  # of 64 rows
    net = small(vocab_size=1000, hidden_size=32, adaln=False)
    kept, target, factors = torch.randn(300, 32), texts(1, 300, 999)[0], torch.rand(300)

    def made(where, rows):
        own = net.to(where)
        own.zero_grad()
        hidden = kept[:rows].to(where, copy=True).requires_grad_()
        asked = target[:rows].to(where), factors[:rows].to(where)
        kernel = head.cross_entropy_kernel(own, 999)
        narrow = torch.device(where).type == "cuda" and dtype.itemsize == 2
        with torch.autocast("cuda", torch.bfloat16, enabled=narrow):
            loss = head.head_loss(own, hidden, *asked, kernel)
        loss.total.backward()
        layer = own.output_layer.linear
        found = loss.losses, hidden.grad, layer.weight.grad, layer.bias.grad
        return [x.detach().cpu().double() for x in found]

    several, few, wanted = made(device, 300), made(device, 60), made("cpu", 300)
    for a, b in zip(several, wanted, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
    assert torch.allclose(several[0][:60], few[0], rtol=tolerance)  # rows do not see each other


CHOICES = "can_fuse", "can_split", "can_fuse_mlp"


def check_network(device, monkeypatch, adaln=True):
    """Hidden states and all gradients with the kernels and without."""
    tokens = texts(2, 32, 6).to(device)
    sigma = torch.tensor([0.1, 0.7], device=device) if adaln else None
    read = torch.tensor([3, 5, 17], device=device)
    for mask, rows in itertools.product((BlockDiffusion(4), Full()), (None, read)):
        found = []
        for fused in (True, False):
            for name in CHOICES:
                monkeypatch.setattr(block, name, lambda *_, fused=fused: fused)
            net = small(hidden_size=64, adaln=adaln).to(device).train()
            hidden = net.hidden(tokens, sigma, attention_mask=mask, read=rows)
            hidden.square().sum().backward()
            grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
            found.append((hidden, grads))
        (ours, grads), (theirs, wanted) = found
        assert (ours - theirs).abs().max() <= LOGITS * theirs.abs().max()
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            assert (grad - wanted[name]).norm() <= GRADIENTS * wanted[name].norm() + 1e-6, name


def check_dropout_of_a_network(device, monkeypatch):
    """Its draws follow from the device's generator, are not those of another place, and are the
    same where a layer is made again."""
    tokens, found = texts(2, 32, 6).to(device), []
    for name in CHOICES:
        monkeypatch.setattr(block, name, lambda *_: True)
    for seed, again in ((1, "none"), (1, "full"), (2, "none")):
        net = small(hidden_size=64, n_blocks=3, activation_checkpointing=again).to(device).train()
        for each in net.blocks:
            each.dropout = P
        drawn, new_seed = [], residual.new_seed

        def kept(device, drawn=drawn, new_seed=new_seed):
            drawn.append(new_seed(device))
            return drawn[-1]

        monkeypatch.setattr(block, "new_seed", kept)
        torch.manual_seed(seed)
        hidden = net.hidden(tokens, attention_mask=Full())
        assert len({int(each) for each in drawn}) == 2 * len(net.blocks)  # two places of each
        hidden.square().sum().backward()
        found.append([hidden, *(p.grad for p in net.parameters() if p.grad is not None)])
    one, same, other = found
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), KINDS)
def test_a_kernel_is_its_operators(cuda, dtype, tolerance):
    check_residual(cuda, dtype, tolerance)
    check_residual(cuda, dtype, tolerance, [(2, 300, 768), (2, 5, 1536)])
    check_heads(cuda, dtype, tolerance)
    check_mlp(cuda, dtype, tolerance)
    check_cross_entropy(cuda, dtype, tolerance)
    with pytest.MonkeyPatch.context() as patch:
        check_head(cuda, dtype, tolerance, patch)


@pytest.mark.gpu
def test_dropout_is_even(cuda, monkeypatch):
    check_dropout(cuda)
    check_dropout_of_a_network(cuda, monkeypatch)


@pytest.mark.gpu
def test_operators_are_what_the_compiler_is_told(cuda):
    check_operators(cuda)
    check_edges(cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("adaln", [True, False])
def test_a_network_with_the_kernels_is_the_network(cuda, monkeypatch, adaln):
    check_network(cuda, monkeypatch, adaln)


BY_THE_INTERPRETER = """
import pytest, torch, test_training_kernels as t
single = torch.float32, 1e-5
t.check_residual("cpu", *single)
t.check_dropout("cpu")
t.check_dropout_of_a_network("cpu", pytest.MonkeyPatch())
t.check_operators("cpu")
t.check_edges("cpu")
t.check_heads("cpu", *single)
t.check_mlp("cpu", *single)
t.check_cross_entropy("cpu", *single)
for adaln in (True, False):
    t.check_network("cpu", pytest.MonkeyPatch(), adaln)
"""


def test_a_kernel_is_its_operators_by_tritons_interpreter():
    """On a CPU: it makes numpy of the kernels. bfloat16 is for a GPU."""
    pytest.importorskip("triton", reason="pip install triton, to run the kernels on a CPU")
    paths = os.pathsep.join([".", "tests", "tests/models", *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", BY_THE_INTERPRETER], env=environment, check=True)


class OnGpu:
    """What is asked of a tensor; no GPU is needed for that."""

    device, shape, dtype = torch.device("cuda"), (2, 8, 192), torch.float32

    def __init__(self, **change):
        vars(self).update(change)

    def stride(self, dim):
        return 1


LINEAR, FROZEN = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)
TAKEN = [
    (residual.can_fuse, (OnGpu(),), True),
    (residual.can_fuse, (OnGpu(shape=(2, 8, 4096)),), False),
    (residual.can_fuse, (OnGpu(dtype=torch.float64),), False),
    (residual.can_fuse, (torch.zeros(2, 8, 4),), False),
    (heads.can_split, (OnGpu(), 2), True),
    (heads.can_split, (OnGpu(shape=(2, 8, 144)), 2), False),  # heads 24 wide
    (heads.can_split, (torch.zeros(2, 8, 192), 2), False),
    (mlp.can_fuse_mlp, (OnGpu(), LINEAR, LINEAR), True),
    (mlp.can_fuse_mlp, (OnGpu(), LINEAR, torch.nn.Identity()), False),
    (mlp.can_fuse_mlp, (OnGpu(), LINEAR, FROZEN), False),
    (heads.can_split, (OnGpu(dtype=torch.float64), 2), False),
    (mlp.can_fuse_mlp, (OnGpu(dtype=torch.float64), LINEAR, LINEAR), False),
    (mlp.can_fuse_mlp, (torch.zeros(2), LINEAR, LINEAR), False),
]


@pytest.mark.parametrize(("can", "asked", "expected"), TAKEN)
def test_what_the_kernels_take(can, asked, expected, monkeypatch):
    monkeypatch.setattr(starting, "triton", object())
    monkeypatch.setattr(starting, "_can_start", lambda device: True)
    assert can(*asked) == expected
    with torch.no_grad():
        assert not can(*asked)  # it is worth it in training alone
    monkeypatch.setattr(starting, "triton", None)
    assert not can(*asked)


def test_a_copy_has_operators_of_its_own(tmp_path, monkeypatch):
    """An export brings these files along. Two operators of one name end the process."""
    shutil.copytree(ROOT / "models" / "kernels", tmp_path / "copy_of_kernels")
    monkeypatch.syspath_prepend(tmp_path)
    for path in sorted((ROOT / "models" / "kernels").glob("[a-z]*.py")):
        ours = importlib.import_module(f"models.kernels.{path.stem}")
        theirs = importlib.import_module(f"copy_of_kernels.{path.stem}")
        for name, operator in vars(ours).items():
            if isinstance(operator, torch._library.custom_ops.CustomOpDef):
                assert operator._qualname != vars(theirs)[name]._qualname
