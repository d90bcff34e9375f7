"""Checkpoints under Lightning: resumed from the published layout, written whole or not at all."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import lightning
import pytest
import torch
from checkpoint_helpers import BY_ALGO, INFO, NAMES, network, path, renamed, variant
from conftest import load
from fsspec.implementations.memory import MemoryFileSystem

from checkpointing import torch_file
from checkpointing.layouts import CheckpointError, read_checkpoint
from training.checkpoint_io.files import SafeCheckpointIO

STEPS = 2


class Resumed(lightning.LightningModule):
    """The published state under a training step that has nothing random."""

    def __init__(self, checkpoint):
        super().__init__()
        if checkpoint.interval is not None:
            self.register_buffer("sampling_eps_min", torch.zeros(()))
            self.register_buffer("sampling_eps_max", torch.zeros(()))
        self.backbone = network(checkpoint).train()
        self.seen = {}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.backbone.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_load_checkpoint(self, checkpoint):
        self.seen = checkpoint

    def on_train_start(self):
        self.start = {k: v.clone() for k, v in self.state_dict().items()}
        self.step_at_start = self.trainer.global_step
        optimizer = self.optimizers().optimizer
        self.moments = [optimizer.state[p]["exp_avg"].clone() for p in self.backbone.parameters()]

    def training_step(self, batch, index):
        return sum(p.square().sum() for p in self.backbone.parameters())


def trainer(folder, **options):
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        plugins=[SafeCheckpointIO()],
        **options,
    )


def resume(checkpoint_path, folder):
    checkpoint = read_checkpoint(checkpoint_path)
    module = Resumed(checkpoint)
    run = trainer(folder, max_steps=checkpoint.step + STEPS)
    data = torch.utils.data.DataLoader(torch.zeros(40, 1))
    run.fit(module, data, ckpt_path=str(checkpoint_path))
    return module, run, checkpoint


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_lightning_resumes_a_published_checkpoint(name, compiled, tmp_path):
    if compiled and name != NAMES[0]:
        return
    file = path(name)
    if compiled:
        full = SafeCheckpointIO().load_checkpoint(file)
        renamed(full, lambda key: key.replace("backbone.", "backbone._orig_mod."))
        file = tmp_path / "compiled.ckpt"
        SafeCheckpointIO().save_checkpoint(full, file)
    module, run, checkpoint = resume(file, tmp_path)
    assert module.step_at_start == checkpoint.step
    assert run.global_step == checkpoint.step + STEPS
    recorded = load(f"weights/{name}.safetensors")
    assert list(module.start) == INFO[name]["state_dict_keys"]
    for key, value in module.start.items():
        assert torch.equal(value, recorded[key])
    stored = SafeCheckpointIO().load_checkpoint(path(name))["optimizer_states"][0]
    for number, moment in enumerate(module.moments):
        assert torch.equal(moment, stored["state"][number]["exp_avg"])
    assert run.optimizers[0].param_groups[0]["eps"] == stored["param_groups"][0]["eps"]
    schedule = run.lr_scheduler_configs[0].scheduler  # timm's state of mdlm is translated
    assert schedule.last_epoch == checkpoint.step + STEPS
    assert module.seen["ema"]["num_updates"] == INFO[name]["ema"]["num_updates"]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_read_and_written_is_the_same_bit_for_bit(name, tmp_path):
    """ckpt -> read -> ckpt: same keys in the same order, same tensors, same numbers."""
    before = SafeCheckpointIO().load_checkpoint(path(name))
    SafeCheckpointIO().save_checkpoint(before, tmp_path / "again.ckpt")
    after = SafeCheckpointIO().load_checkpoint(tmp_path / "again.ckpt")
    assert_same(before, after)
    named = read_checkpoint(tmp_path / "again.ckpt")
    listed = list(named.ema.values())
    assert_same(listed, before["ema"]["shadow_params"])
    torch.load(tmp_path / "again.ckpt", weights_only=True)  # plain for everybody else as well


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("moment", ["save", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_last_good_file(moment, tmp_path, monkeypatch):
    target = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"state_dict": {"a": torch.ones(3)}}, target)

    def fail(*arguments):
        raise Interrupted

    place = torch_file.torch if moment == "save" else os
    monkeypatch.setattr(place, moment, fail)
    with pytest.raises(Interrupted):
        SafeCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(3)}}, target)
    monkeypatch.undo()
    assert torch.equal(SafeCheckpointIO().load_checkpoint(target)["state_dict"]["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_killed_process_leaves_a_whole_checkpoint_and_the_next_save_cleans_up(tmp_path):
    """SIGKILL in the midst of writing."""
    target = tmp_path / "last.ckpt"
    code = textwrap.dedent(
        f"""
        import torch
        from checkpointing import torch_file
        n = 0
        while True:
            n += 1
            values = {{"a": torch.full((200_000,), float(n))}}
            torch_file.save({{"state_dict": values}}, {str(target)!r})
            if n == 1:
                print("ready", flush=True)
        """
    )
    root = os.path.dirname(os.path.dirname(torch_file.__file__))
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, start_new_session=True
    )
    assert run.stdout.readline() == b"ready\n"
    time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    values = SafeCheckpointIO().load_checkpoint(target)["state_dict"]["a"]
    assert (values == values[0]).all()
    SafeCheckpointIO().save_checkpoint({"state_dict": {}}, target)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_every_truncation_of_a_checkpoint_is_noticed(tmp_path):
    whole = path(NAMES[0]).read_bytes()
    file = tmp_path / "cut.ckpt"
    for size in [0, 1, 3, 4, 30, 1000, *range(5000, len(whole), 60_000), len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.ckpt"):
            SafeCheckpointIO().load_checkpoint(file)


def test_files_get_the_rights_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        SafeCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "a" / "b.ckpt")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b.ckpt").stat().st_mode & 0o777 == 0o640


def test_a_store_behind_a_url_takes_and_gives_checkpoints():
    io = SafeCheckpointIO()
    io.save_checkpoint({"state_dict": {"a": torch.ones(2)}}, "memory://runs/x/last.ckpt")
    io.save_checkpoint({"state_dict": {"a": torch.zeros(2)}}, "memory://runs/x/last.ckpt")
    found = io.load_checkpoint("memory://runs/x/last.ckpt")
    assert torch.equal(found["state_dict"]["a"], torch.zeros(2))
    assert MemoryFileSystem().ls("/runs/x", detail=False) == ["/runs/x/last.ckpt"]
    io.remove_checkpoint("memory://runs/x/last.ckpt")
    with pytest.raises(CheckpointError, match="does not exist"):
        io.load_checkpoint("memory://runs/x/last.ckpt")


def test_removing_a_checkpoint_removes_a_file_or_a_folder(tmp_path):
    (tmp_path / "sharded.ckpt").mkdir()
    (tmp_path / "sharded.ckpt" / "part").write_text("x")
    (tmp_path / "one.ckpt").write_text("x")
    for name in ("sharded.ckpt", "one.ckpt", "absent.ckpt"):
        SafeCheckpointIO().remove_checkpoint(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_state_dict_is_not_resumed(tmp_path):
    torch.save({"model": {}}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="without a state_dict"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


def test_storage_options_are_refused_rather_than_ignored(tmp_path):
    with pytest.raises(TypeError, match="storage_options"):
        SafeCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt", storage_options={"a": 1})


def test_reading_for_evaluation_skips_the_optimizer(tmp_path):
    """Its storages may even be missing: they are not looked at."""
    raw = read_checkpoint(path(BY_ALGO["ar"])).raw
    assert "optimizer_states" not in raw
    assert "optimizer_states" in SafeCheckpointIO().load_checkpoint(path(BY_ALGO["ar"]))
    assert (
        read_checkpoint(variant(tmp_path, BY_ALGO["ar"], lambda raw: None)).step
        == raw["global_step"]
    )
