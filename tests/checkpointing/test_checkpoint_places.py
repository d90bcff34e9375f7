"""Where weights lie: URLs, launch folder, models by their hub id, S3."""

import json
import shutil
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from checkpoint_helpers import BY_ALGO, INFO, path
from hub_folders import (
    CONFIG,
    HUB_FOLDER,
    LAYOUTS,
    TENSORS,
    hub_config,
    hub_tensors,
    put,
    same_weights,
    shard,
)
from processes import process
from runs import differences, run
from safetensors.torch import save_file

from checkpointing.layouts import CheckpointError, read_checkpoint
from training.checkpoint_io.files import SafeCheckpointIO

TESTS = Path(__file__).parents[1]


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_behind_a_url_loads(layout, memory, tmp_path):
    put(tmp_path, CONFIG)
    LAYOUTS[layout](tmp_path)
    memory.put(str(tmp_path), "/models/x", recursive=True)
    same_weights(read_checkpoint("memory://models/x"), TENSORS)


def test_a_lightning_checkpoint_behind_a_url_loads(memory):
    name = BY_ALGO["ar"]
    memory.put(str(path(name)), "/runs/last.ckpt")
    found = read_checkpoint("memory://runs/last.ckpt")
    assert found.algo == "ar"
    assert found.step == INFO[name]["global_step"]
    with pytest.raises(CheckpointError, match=r"memory://runs/other\.ckpt does not exist"):
        read_checkpoint("memory://runs/other.ckpt")


def test_a_protocol_without_its_package_is_explained():
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_checkpoint("nosuchprotocol://bucket/x.ckpt")


def test_relative_paths_are_relative_to_the_launch_folder(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    shutil.copy(path(BY_ALGO["ar"]), tmp_path / "launch" / "a.ckpt")
    monkeypatch.chdir(tmp_path)
    assert read_checkpoint("launch/a.ckpt").algo == "ar"
    with pytest.raises(CheckpointError, match=r"a\.ckpt does not exist"):
        read_checkpoint("a.ckpt")
    monkeypatch.chdir(tmp_path / "launch")
    assert read_checkpoint("a.ckpt").algo == "ar"


def test_a_file_needs_no_ending(tmp_path):
    shutil.copy(path(BY_ALGO["mdlm"]), tmp_path / "bamdlm-owt-block_size4")
    assert read_checkpoint(tmp_path / "bamdlm-owt-block_size4").algo == "mdlm"


def test_a_revision_of_a_local_file_is_refused():
    with pytest.raises(CheckpointError, match="concerns hub ids"):
        read_checkpoint(path(BY_ALGO["ar"]), revision="main")


# The hub, through its own client

IDS = [
    *(f"kuleshov-group/{a}-owt-block_size{s}" for a in ("bamdlm", "bd3lm") for s in (4, 8, 16)),
    "kuleshov-group/bd3lm-owt-block_size1024-pretrain",
    "kuleshov-group/mdlm-owt",
    "kuleshov-group/mdlm-noeos-owt",
    "kuleshov-group/sedd-noeos-owt",
    "kuleshov-group/ar-noeos-owt",
]


def algorithm(model_id):
    name = model_id.partition("/")[2].partition("-")[0]
    return {"bd3lm": "bamdlm"}.get(name, name)


def ask(names, folder, **environment):
    """What a process with these variables reads, in a fork that has huggingface_hub yet to import:
    [algorithms, one weight] of each or why not."""
    pairs = [(name, None) if isinstance(name, str) else name for name in names]

    def answer(_):
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]
        found = []
        for name, revision in pairs:
            try:
                c = read_checkpoint(name, revision=revision)
                first = float(c.weights["vocab_embed.embedding"][0, 0])
                found.append([c.algorithms, first])
            except ValueError as error:
                found.append(str(error))
        (folder / "found.json").write_text(json.dumps(found))
        return 0

    code, text = run([], folder / "log", program=answer, environment=environment)
    assert code == 0, text
    return json.loads((folder / "found.json").read_text())


def test_models_come_from_the_hub_by_id_and_from_the_cache_when_offline(tmp_path):
    root = tmp_path / "hub"
    for model_id in IDS:
        algo = algorithm(model_id)
        tensors = TENSORS if algo == "bamdlm" else hub_tensors(algo)
        put(root / model_id / "main", hub_config(algo), tensors)
    old = {key: value + 1 for key, value in TENSORS.items()}
    put(root / IDS[0] / "v1", CONFIG, old)
    put(root / "me" / "pickled" / "main", CONFIG)
    torch.save(TENSORS, root / "me" / "pickled" / "main" / "pytorch_model.bin")
    put(root / "me" / "shards" / "main", CONFIG)
    shard(root / "me" / "shards" / "main", TENSORS, "safetensors", save_file)
    put(root / "me" / "half" / "main", CONFIG)
    shard(root / "me" / "half" / "main", TENSORS, "safetensors", save_file)
    (root / "me" / "half" / "main" / "model-00002-of-00002.safetensors").unlink()
    put(root / "me" / "empty" / "main", CONFIG)
    (root / "me" / "noconfig" / "main").mkdir(parents=True)

    env = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    env["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    first = float(TENSORS["backbone.vocab_embed.embedding"][0, 0])
    special = ["me/pickled", "me/shards", (IDS[0], "v1"), f"{IDS[0]}@v1"]
    broken = {
        "me/half": "model-00002-of-00002.safetensors, which is not there",
        "me/empty": "none of model.safetensors",
        "me/noconfig": "no config.json",
        "me/absent": "does not exist",
        f"{IDS[0]}@v2": "no such branch, tag or commit",
    }
    with process(str(TESTS / "hub_server.py"), str(root)) as port:
        endpoint = f"http://127.0.0.1:{port}"
        found = ask([*IDS, *special, *broken], tmp_path, HF_ENDPOINT=endpoint, **env)
    for model_id, (algorithms, _) in zip(IDS, found, strict=False):
        assert algorithms == [algorithm(model_id)]
    pickled, shards, by_argument, by_name = found[len(IDS) : len(IDS) + len(special)]
    assert pickled[1] == shards[1] == found[0][1] == pytest.approx(first)
    assert by_argument == by_name
    assert by_name[1] == pytest.approx(first + 1)
    for message, expected in zip(found[len(IDS) + len(special) :], broken.values(), strict=True):
        assert expected in message

    wanted = [*IDS, *special, "me/absent", "me/empty"]
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    offline = ask(wanted, tmp_path, **env)
    assert offline[:-2] == found[: len(wanted) - 2]
    assert "is not in the cache (HF_HUB_OFFLINE is set)" in offline[-2]
    assert "none of model.safetensors" in offline[-1]
    assert "HF_HUB_OFFLINE" in offline[-1]


def test_an_unreachable_hub_is_named(tmp_path):
    (found,) = ask(
        ["me/model"],
        tmp_path,
        HF_HOME=str(tmp_path),
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    assert "the hub cannot be reached" in found


# S3, through a server process


def test_checkpoints_live_in_s3_as_well(s3, tmp_path):
    source = path(BY_ALGO["mdlm"])

    def client():
        """In a process of its own, as it keeps connections and a thread."""
        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        fs.put(str(source), "bucket/runs/last.ckpt")
        fs.put(str(HUB_FOLDER), "bucket/hub", recursive=True)
        io = SafeCheckpointIO()
        whole = io.load_checkpoint("s3://bucket/runs/last.ckpt")
        io.save_checkpoint(whole, "s3://bucket/runs/again.ckpt")
        for url, local in (("runs/again.ckpt", source), ("hub", HUB_FOLDER)):
            found = read_checkpoint(f"s3://bucket/{url}")
            expected = read_checkpoint(local).weights
            assert (
                differences(dict(sorted(found.weights.items())), dict(sorted(expected.items())))
                == []
            )
        files = sorted(fs.ls("bucket/runs", detail=False))
        assert files == ["bucket/runs/again.ckpt", "bucket/runs/last.ckpt"]
        with pytest.raises(CheckpointError, match=r"s3://bucket/none\.ckpt does not exist"):
            read_checkpoint("s3://bucket/none.ckpt")
        sys.exit(0)

    code, text = run([], tmp_path / "log", before=client, environment=s3)
    assert code == 0, text
