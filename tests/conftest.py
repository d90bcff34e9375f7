"""What every test shares: where the recordings lie, and one thread, so that two workers fit."""

import gc
import json
import os
import signal
from pathlib import Path

import pytest

# tests fork runs; the tokenizer's threads would not be there in them
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


def load(name):
    """The tensors of a golden safetensors file, {name: tensor}."""
    from safetensors.torch import load_file

    return load_file(GOLDEN / name)


def load_json(name):
    return json.loads((GOLDEN / name).read_text())


@pytest.fixture(scope="session", autouse=True)
def _single_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_peak():
    """One small matrix product in each run, in the place of 24: nobody reads its share of the
    peak. What is forked has it too."""
    from training import flops

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "PEAK_TRIES", 1)
        patch.setitem(flops.PEAK_SIZE, "cpu", 64)
        yield


@pytest.fixture(scope="session")
def wholes(tmp_path_factory):
    """algorithm -> (overrides, folder, last checkpoint) of a run that nothing disturbed."""
    from runs import Wholes

    return Wholes(tmp_path_factory.mktemp("wholes"))


@pytest.fixture
def _launch_folder(tmp_path, monkeypatch):
    """An empty one to run main in; which listens to signals, and pytest has its own."""
    from training.signals import HEARD

    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in HEARD}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def cuda():
    """The GPU of tests that need one."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def s3():
    """The environment with which clients reach an S3 server; each test has its own buckets."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from processes import s3_server

    with s3_server() as environment:
        yield environment


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports and tests make a million objects that stay. To look for garbage among them takes half
    a second each time; a forked run does it too, and copies the pages that they are on."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    """The jobs of Slurm first: they take longest, and mostly wait, so they run beside the rest.
    Then tests/training, which forks most: the kernel copies the tables of all the memory that a
    worker holds, and that grows."""

    def late(item):
        return item.get_closest_marker("slurm") is None, "training" not in item.nodeid.split("/")

    items.sort(key=late)
