"""benchmarks/gpu_train.py: the largest batch as it looks for it, and what it times."""

import functools

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_train import BATCHES, Kind, bracketed, compile_kind, run_block, stepper
from models.compiling import compiled
from objectives import graphs


@pytest.fixture
def traced(monkeypatch):
    """Of the graphs that torch.compile made, without a code generator: whether each has sizes that
    may change; and the numbers of those that ran."""
    caches = compiled, run_block
    made, ran = [], []

    def backend(graph, inputs):
        number = len(made)
        made.append(any(isinstance(each, torch.SymInt) for each in inputs))

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


def test_what_is_timed_was_compiled_before_and_for_one_batch(traced, monkeypatch):
    monkeypatch.setattr(graphs, "WARM_UP", 9)  # what a CPU cannot do is to record
    args, (made, ran) = gpu.parse(["train", "--tiny"]), traced
    args.batch = 8
    kinds = [Kind(*algo, "sdpa", True) for algo in (("bamdlm", 16), ("mdlm", None), ("ar", 1))]
    for kind in kinds:
        compile_kind(kind, args)
    compiled = len(made)

    for kind in kinds:
        run = stepper(kind, args, n_blocks=3)
        timed, searched = set(), set()
        for numbers, batches, any_batch in ((timed, (8, 8), False), (searched, (4, 16, 8), True)):
            ran.clear()
            for batch in batches:
                run(0, batch, any_batch=any_batch)
            numbers.update(ran)
        # any number of rows is read, by the last block and by the head
        assert [made[number] for number in sorted(timed)].count(False) == 1, kind
        assert all(made[number] for number in searched), kind
        assert len(timed & searched) == 1  # the head
    assert len(made) == compiled


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
