"""The nucleus in one kernel, models/kernels/top_p.py: the tokens that samplers/nucleus.py keeps."""

import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from models.kernels import starting, top_p
from samplers import nucleus as nucleus_module
from samplers.nucleus import by_search, call, nucleus

PS = (1e-13, 0.9, 1 - 1e-12)


def rows(vocabulary, device="cpu"):
    """Log-probabilities [7, V], each row of another kind."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(7, vocabulary, generator=generator) * 2
    rows[1] = rows[1].round()  # ties
    rows[2] = 0  # nothing but ties
    rows[3, 1:] = -torch.inf
    rows[4, ::2] = -torch.inf
    rows[5, vocabulary // 2] += 30  # nearly all mass on one
    rows[6, [0, -1]] += 30  # on two
    return rows.log_softmax(-1).to(device)


def compare(log_p, p, exp=torch.exp):
    """exp: what the kernel computes by."""
    known = SimpleNamespace(shape=log_p.shape, device=log_p.device, exp=lambda: exp(log_p))
    wanted = log_p.masked_fill(~by_search(known, p), -torch.inf)
    assert torch.equal(top_p.filtered(log_p, p), wanted), (log_p.shape, p)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [7, 37, 5000, 50258])
def test_the_kernel_keeps_what_the_search_keeps(cuda, vocabulary):
    log_p = rows(vocabulary, cuda)
    many = top_p.processors(cuda)  # and few are taken by other tiles
    for p in (*PS, 0.01, 0.3, 0.5, 0.99):
        compare(log_p, p)
        compare(torch.randn(many, 2, vocabulary, device=cuda).log_softmax(-1), p)
    wide = torch.cat([log_p, log_p], 1)
    compare(wide[:, :vocabulary], 0.9)  # parts of wider rows


@pytest.mark.gpu
def test_draws_with_the_kernel_are_those_without(cuda, monkeypatch):
    log_p = rows(50258, cuda)
    with torch.no_grad():
        assert top_p.can_filter(log_p)
        found = nucleus(log_p, 0.9)
        monkeypatch.setattr(nucleus_module, "can_filter", lambda log_probs: False)
        assert torch.equal(found, nucleus(log_p, 0.9))
        apart = torch.compiler.disable(call)  # as draw.py does, for the steps without the kernel
        compiled = torch.compile(functools.partial(nucleus, search=True, apart=apart))
        assert torch.equal(found, compiled(log_p, 0.9))
        monkeypatch.undo()
        torch._dynamo.reset()
        assert torch.equal(found, compiled(log_p, 0.9))


BY_THE_INTERPRETER = """
import numpy, torch, test_top_p as t
def exp(log_p):
    return torch.from_numpy(numpy.exp(log_p.numpy()))
t.top_p.Tiles.TOKENS = 1  # a tile of 16
t.compare(t.rows(5), 0.9, exp)
for p in t.PS:
    t.compare(t.rows(40), p, exp)
t.compare(t.rows(60)[:1, None, :40], 0.9, exp)
"""


def test_the_kernel_keeps_what_the_search_keeps_by_tritons_interpreter():
    """On a CPU: it makes numpy of the kernel, exp among it."""
    pytest.importorskip("triton", reason="pip install triton, to run the kernel on a CPU")
    paths = os.pathsep.join([".", "tests", *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", BY_THE_INTERPRETER], env=environment, check=True)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_nucleus_is_taken_by_the_kernel(monkeypatch, search, compiled):
    asked = []

    def stand_in(log_probs, p):
        asked.append(p)
        return log_probs.masked_fill(~by_search(log_probs, p), -torch.inf)

    log_p = torch.randn(3, 5000, generator=torch.Generator().manual_seed(4)).log_softmax(-1)
    wanted = nucleus(log_p, 0.9)
    monkeypatch.setattr(nucleus_module, "can_filter", lambda log_probs: True)
    monkeypatch.setattr(nucleus_module, "filtered", stand_in)
    monkeypatch.setattr(nucleus_module, "MOST_ROWS", 2)  # and fewer are counted
    ours = torch.compile(nucleus, backend="eager") if compiled else nucleus
    assert torch.equal(ours(log_p, 0.9, search), wanted)
    assert asked == [0.9]
    nucleus(log_p[:, : nucleus_module.SORTED], 0.9, search)  # sorted, as ever
    nucleus(log_p.double(), 0.9, search)
    assert asked == [0.9]


def test_the_compiler_knows_what_the_kernel_returns():
    with FakeTensorMode():
        wide = torch.empty(2, 3, 80)
        found = top_p.filtered(wide[..., :50], 0.9)
    assert found.shape == (2, 3, 50)
    assert found.is_contiguous()
    assert found.dtype == torch.float32


class OnGpu:
    """What is asked of log-probabilities; no GPU is needed for that."""

    device, dtype = torch.device("cuda"), torch.float32


def test_what_the_kernel_takes(monkeypatch):
    monkeypatch.setattr(starting, "triton", object())
    monkeypatch.setattr(starting, "_can_start", lambda device: True)
    given = OnGpu()
    assert not top_p.can_filter(given)  # it has no gradients
    with torch.no_grad():
        assert top_p.can_filter(given)
        assert not top_p.can_filter(torch.zeros(2, 5))
        given.dtype = torch.float64
        assert not top_p.can_filter(given)
        given.dtype = torch.float32
        monkeypatch.setattr(starting, "triton", None)
        assert not top_p.can_filter(given)
