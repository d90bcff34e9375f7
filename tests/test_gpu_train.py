"""benchmarks/gpu_train.py: the largest batch as it looks for it, and what it times."""

import functools

import pytest
import torch

from benchmarks import gpu, gpu_train
from benchmarks.gpu_train import BATCHES, Kind, bracketed
from objectives import graphs, head


@pytest.fixture
def traced(monkeypatch):
    """Numbers of the graphs that torch.compile made, without a code generator, and that ran."""
    caches = head._compiled_cross_entropy, gpu_train.run_block
    made, ran = [], []

    def backend(graph, inputs):
        number = len(made)
        made.append(number)

        def run(*given):
            ran.append(number)
            return graph.forward(*given)

        return run

    def clear():
        torch._dynamo.reset()
        for each in caches:
            each.cache_clear()

    clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield made, ran
    clear()


@pytest.mark.parametrize(("algo", "size"), [("bamdlm", 16), ("mdlm", None), ("ar", 1)])
def test_what_is_timed_was_compiled_before_and_for_one_batch(algo, size, traced, monkeypatch):
    monkeypatch.setattr(graphs, "WARM_UP", 9)  # what a CPU cannot do is to record
    args = gpu.parse(["train", "--tiny"])
    args.batch = 8
    kind, (made, ran) = Kind(algo, size, "sdpa", True), traced
    assert list(gpu_train.compiled(kind, args)) == ["compiled_in"]
    compiled = set(made)
    run = gpu_train.stepper(kind, args, n_blocks=3)

    def steps(*batches, **how):
        ran.clear()
        for batch in batches:
            run(0, batch, **how)
        return set(ran)

    timed, searched = steps(8, 8), steps(4, 16, 8, any_batch=True)
    assert set(made) == compiled == timed | searched
    assert len(timed & searched) == 1  # the head, which is compiled for any number of rows


@pytest.mark.parametrize("most", [32, 33, 64, 95, 96, 100, 136, 200])
@pytest.mark.parametrize("guess", [32, 60, 96, 140])
def test_the_next_batch_does_not_fit(most, guess):
    asked = []

    def fitting(batch):
        asked.append(batch)
        return batch <= most

    found = bracketed(fitting, 32, guess)
    assert found == most // BATCHES * BATCHES
    assert found in (32, *asked)
    assert found + BATCHES in asked
    assert len(set(asked)) == len(asked)


def test_what_is_not_found_is_no_number():
    with pytest.raises(RuntimeError, match="at least 4128"):
        bracketed(lambda batch: True, 32, 32)
