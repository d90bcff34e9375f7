"""The largest batch, as benchmarks/gpu_train.py looks for it."""

import pytest

from benchmarks.gpu_train import BATCHES, bracketed


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
