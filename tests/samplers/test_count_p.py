"""The nucleus of a few rows, counted by many programs: models/kernels/count_p.py."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_top_p import PS, rows
from torch._subclasses import FakeTensorMode

from models.kernels import count_p
from samplers import nucleus as nucleus_module
from samplers.nucleus import by_search, nucleus


def compare(log_p, p, exp=torch.exp):
    """exp: what the kernel computes by."""
    known = SimpleNamespace(shape=log_p.shape, device=log_p.device, exp=lambda: exp(log_p))
    wanted = log_p.masked_fill(~by_search(known, p), -torch.inf)
    assert torch.equal(count_p.counted(log_p, p), wanted), (log_p.shape, p)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [7, 37, 5000, 50258])
def test_what_is_counted_is_what_the_search_keeps(cuda, vocabulary):
    log_p = rows(vocabulary, cuda)
    for p in (*PS, 0.01, 0.3, 0.5, 0.99):
        compare(log_p, p)
        compare(torch.randn(40, 2, vocabulary, device=cuda).log_softmax(-1), p)
    compare(torch.cat([log_p, log_p], 1)[:, :vocabulary], 0.9)  # part of wider rows


BY_THE_INTERPRETER = """
import numpy, torch, test_count_p as t
def exp(log_p):
    return torch.from_numpy(numpy.exp(log_p.numpy()))
t.count_p.SLICE = 16
t.compare(t.rows(5), 0.9, exp)
for p in t.PS:
    t.compare(t.rows(40), p, exp)
t.compare(t.rows(60)[:1, None, :40], 0.9, exp)
t.compare(torch.full((1, 40), -20.0), 0.9, exp)  # all fit
"""


def test_what_is_counted_is_what_the_search_keeps_by_tritons_interpreter():
    """On a CPU: it makes numpy of the kernels, exp among it."""
    pytest.importorskip("triton", reason="pip install triton, to run the kernels on a CPU")
    paths = os.pathsep.join([".", "tests", *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", BY_THE_INTERPRETER], env=environment, check=True)


def test_few_rows_are_counted(monkeypatch):
    asked = []
    monkeypatch.setattr(nucleus_module, "can_filter", lambda log_probs: True)
    for name in ("counted", "filtered"):
        monkeypatch.setattr(nucleus_module, name, lambda x, p, name=name: asked.append(name))
    for count in (count_p.MOST_ROWS, count_p.MOST_ROWS + 1):
        nucleus(torch.zeros(count, 5000), 0.9)
    assert asked == ["counted", "filtered"]


def test_the_compiler_knows_what_is_counted():
    with FakeTensorMode():
        found = count_p.counted(torch.empty(2, 3, 80)[..., :50], 0.9)
    assert found.shape == (2, 3, 50)
    assert found.is_contiguous()
    assert found.dtype == torch.float32
