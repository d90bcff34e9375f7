"""Bad inputs of the command line: each is refused in one clear line, at once."""

import pytest
from tools import refused, refused_process

TRAIN = ["data=shakespeare", "wandb=null"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_wrong_word_is_refused_here_and_in_a_process():
    words = [*TRAIN, "seed=x"]
    here = refused(words, "seed=x must be a whole number")
    assert refused_process(words) == here
