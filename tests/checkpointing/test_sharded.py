"""Checkpoints in parts as folders: what is written is read, and what is damaged or hostile is
refused in one sentence, with nothing run."""

import json
import os
import pickle
import shutil
import signal
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from runs import differences
from torch.distributed import checkpoint as dcp

from checkpointing import replacing, sharded
from checkpointing.layouts import CheckpointError, read_checkpoint
from training.checkpoint_io.files import SafeCheckpointIO


def checkpoint(step=3):
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.arange(6.0).view(2, 3)}
    state = OrderedDict(a=torch.randn(4, 5).bfloat16(), b=torch.tensor(0.5), c=torch.zeros(0, 2))
    group = {"params": [0], "betas": (0.9, 0.99)}
    return {
        "global_step": step,
        "state_dict": state,
        "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": [torch.randn(7)]},
        "optimizer_states": [{"state": {0: moments}, "param_groups": [group]}],
        "sampler": {"random_state": torch.arange(4, dtype=torch.uint8)},
    }


def write(path, step=3):
    made = checkpoint(step)
    sharded.write(sharded.take_apart(made), str(path), group=None, token="t")
    return made


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "step=3.ckpt")
    return tmp_path / "step=3.ckpt"


def test_what_is_written_is_read(tmp_path):
    """Also by torch's own tools, where its author is trusted."""
    path = tmp_path / "step=3.ckpt"
    made = write(path)
    assert differences(sharded.read(path), made) == []
    assert (
        differences(
            SafeCheckpointIO().load_checkpoint(path) | {"lr_schedulers": []},
            {**made, "hyper_parameters": {}, "lr_schedulers": []},
        )
        == []
    )
    meta = sharded.read(path, ())
    assert meta["state_dict"]["a"].is_meta
    assert float(meta["state_dict"]["b"]) == 0.5
    state = {"ema/shadow_params/0": torch.zeros(7)}
    dcp.load(state, checkpoint_id=str(path))
    assert torch.equal(state["ema/shadow_params/0"], made["ema"]["shadow_params"][0])


def test_what_training_changes_meanwhile_is_not_written(tmp_path):
    made = checkpoint()
    parts = sharded.take_apart(made)
    expected = checkpoint()
    expected["state_dict"]["a"] = made["state_dict"]["a"].clone()
    expected["ema"]["shadow_params"][0] = made["ema"]["shadow_params"][0].clone()
    for tensor in (*made["state_dict"].values(), made["ema"]["shadow_params"][0]):
        tensor.add_(1)
    made["optimizer_states"][0]["state"][0]["step"].add_(1)
    made["ema"]["num_updates"] = 4
    sharded.write(parts, str(tmp_path / "step=3.ckpt"), group=None, token="t")
    assert differences(sharded.read(tmp_path / "step=3.ckpt"), expected) == []
    again = sharded.take_apart(made, before=parts)
    assert again.tensors["state_dict/a"] is parts.tensors["state_dict/a"]
    sharded.write(again, str(tmp_path / "step=4.ckpt"), group=None, token="t")
    assert differences(sharded.read(tmp_path / "step=4.ckpt"), made) == []


def test_ranks_share_what_all_of_them_hold():
    made = checkpoint()
    shares = [set(sharded.take_apart(made, rank, 3).tensors) for rank in range(3)]
    assert set.union(*shares) == set(sharded.take_apart(made).tensors)
    assert sum(map(len, shares)) == len(set.union(*shares))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_name_without_a_step_is_a_link_and_nothing_old_stays(tmp_path):
    best = tmp_path / "best.ckpt"
    SafeCheckpointIO().save_checkpoint({"state_dict": {}}, best)
    for step in (3, 5):
        write(best, step)
        assert sharded.read(best)["global_step"] == step
        assert names(tmp_path) == [f"best-step={step}.ckpt", "best.ckpt"]
    write(best, 5)
    assert names(tmp_path) == ["best-step=5.ckpt", "best.ckpt"]
    SafeCheckpointIO().save_checkpoint({"state_dict": {}}, best)
    assert names(tmp_path) == ["best.ckpt"]
    write(best, 6)
    replacing.remove(best)
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", ["symlink", "replace", "rename"])
def test_what_a_kill_between_a_folder_and_its_link_leaves_is_known(step, tmp_path):
    """Ahead of the link, of its exchange, and of the removal of the folder it led to."""
    best = tmp_path / "best.ckpt"
    write(tmp_path / "step=2.ckpt", 2)
    write(best, 2)
    child = os.fork()
    if child == 0:
        real = getattr(os, step)

        def killed(*given, **named):
            if Path(given[0]).name.startswith(begins[step]):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        begins = {"symlink": "best", "replace": ".best.ckpt", "rename": "best-step=2"}
        setattr(os, step, killed)
        write(best, 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    led, other = (2, 4) if step != "rename" else (4, 2)
    assert sharded.read(best)["global_step"] == led
    assert list(replacing.left_behind(tmp_path)) == [tmp_path / f"best-step={other}.ckpt"]
    shutil.rmtree(tmp_path / f"best-step={other}.ckpt")
    assert list(replacing.left_behind(tmp_path)) == []


def test_a_file_and_a_folder_take_each_others_place(folder):
    SafeCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 1}, folder)
    assert folder.is_file()
    write(folder, 4)
    assert sharded.read(folder)["global_step"] == 4
    assert names(folder.parent) == [folder.name]


def test_a_folder_stays_where_what_should_replace_it_fails(folder):
    with pytest.raises(OSError, match="full"), replacing.making_way(folder):
        raise OSError("full")
    assert sharded.read(folder)["global_step"] == 3
    assert names(folder.parent) == [folder.name]


def edited(change):
    def damage(folder):
        path = folder / "index.json"
        index = json.loads(path.read_text())
        change(index["tensors"])
        path.write_text(json.dumps(index))

    return damage


def cut(folder):
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def flipped(folder):
    path = folder / "__0_0.distcp"
    data = path.read_bytes()
    place = data.index(torch.arange(6.0).numpy().tobytes())
    path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])


def elsewhere(parts):
    parts["state_dict/a"]["parts"][0][2] = "../../etc/passwd"


def huge(parts):
    parts["state_dict/a"]["size"] = parts["state_dict/a"]["parts"][0][1] = [1 << 40, 5]


def twice(parts):
    parts["state_dict/a"]["parts"] *= 2


def half(parts):
    parts["state_dict/a"]["parts"][0][1] = [2, 5]


def another(parts):
    parts["ema/shadow_params/0"]["parts"] = parts["optimizer_states/0/state/0/exp_avg"]["parts"]
    parts["ema/shadow_params/0"]["size"] = [2, 3]
    parts["ema/shadow_params/0"]["dtype"] = "int32"


DAMAGES = {
    "no index": (lambda folder: (folder / "index.json").unlink(), "it has no index.json"),
    "half an index": (lambda f: (f / "index.json").write_text('{"version": 1'), "index.json is"),
    "no state": (lambda folder: (folder / "state.ckpt").unlink(), "state.ckpt: No such file"),
    "no part": (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "a part cut short": (cut, "__0_0.distcp was cut short"),
    "a flipped bit": (flipped, "__0_0.distcp is damaged"),
    "a file elsewhere": (edited(elsewhere), "it names the file"),
    "a huge tensor": (edited(huge), "too short for its numbers"),
    "a part twice": (edited(twice), "are not all of it"),
    "a part too small": (edited(half), "are not all of it"),
    "another part": (edited(another), "holds another part"),
    "a tensor gone": (edited(lambda parts: parts.pop("state_dict/a")), "name other tensors"),
    "an odd type": (edited(lambda p: p["state_dict/a"].update(dtype="object")), "damaged"),
    "an odd size": (edited(lambda p: p["state_dict/a"].update(size=[-1])), "whole numbers"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_refused_in_one_sentence(damage, folder):
    act, said = DAMAGES[damage]
    act(folder)
    with pytest.raises(CheckpointError, match=said) as refused:
        sharded.read(folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_no_pickle_runs(folder, tmp_path):
    """.metadata is not read at all, and the other two by the restricted unpickler."""
    marker = tmp_path / "ran"
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(marker)))
    sharded.read(folder)
    whole = shutil.copytree(folder, tmp_path / "whole")
    torch.save({"checkpoint": Trap(marker), "places": {}}, folder / "state.ckpt")
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        sharded.read(folder)
    shard, entries = whole / "__0_0.distcp", json.loads((whole / "index.json").read_text())
    torch.save(Trap(marker), shard)
    length = shard.stat().st_size
    for entry in entries["tensors"].values():
        for part in entry["parts"]:
            part[3:] = [0, length]
    (whole / "index.json").write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        sharded.read(whole)
    assert not marker.exists()


def test_behind_a_url_it_is_refused(folder):
    import fsspec

    fs = fsspec.filesystem("memory")
    for path in folder.iterdir():
        fs.pipe(f"/bucket/last.ckpt/{path.name}", path.read_bytes())
    for reader in (read_checkpoint, SafeCheckpointIO().load_checkpoint):
        with pytest.raises(CheckpointError, match=r"read from a disk alone.*consolidate\.py"):
            reader("memory://bucket/last.ckpt")
