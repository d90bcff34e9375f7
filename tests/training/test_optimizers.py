"""Muon and AdamW as one optimizer: what each gets, and that runs, files and skips hold for both."""

import copy

import pytest
import torch
from networks import small, small_llama
from test_training import ALGORITHMS, MASK, module, trained

from checkpointing.layouts import read_checkpoint
from training import resuming
from training.optimizers import (
    MuonAdamW,
    OptimizerSettings,
    build_optimizer,
    matrices,
    shared_out,
)

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
BOTH = OptimizerSettings(ADAMW, momentum=0.9)
INNER = ("attn_qkv.weight", "attn_out.weight", "mlp.0.weight", "mlp.2.weight")


def gradients(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("adaln", [True, False])
def test_muon_gets_the_matrices_of_the_blocks_and_adamw_all_else(adaln):
    net = small(adaln=adaln)
    parts = shared_out(net, BOTH)
    names = {id(p): name for name, p in net.named_parameters()}
    wanted = [f"blocks.{i}.{name}" for i in range(2) for name in INNER]
    assert [names[id(p)] for p in parts["muon"]] == wanted
    everything = [id(p) for part in parts.values() for p in part]
    assert sorted(everything) == sorted(names)
    assert len(set(everything)) == len(everything)
    assert list(shared_out(net, OptimizerSettings(ADAMW))) == ["adamw"]


def test_muon_gets_the_matrices_of_llama_too():
    """Whose blocks have other names."""
    net = small_llama()
    names = {id(p): name for name, p in net.named_parameters()}
    inside = [name for name, p in net.blocks.named_parameters() if p.dim() == 2]
    parts = shared_out(net, BOTH)
    assert [names[id(p)] for p in parts["muon"]] == [f"model.layers.{name}" for name in inside]
    assert len(inside) == 7 * len(net.blocks)
    assert sum(map(len, parts.values())) == len(names)


def test_it_takes_the_steps_of_the_two_alone():
    """Bit for bit, over steps in which a schedule changes the rate of both."""
    one, two = small(), small()
    together = build_optimizer(one, BOTH, fused=True)
    parts = shared_out(two, BOTH)
    alone = [
        torch.optim.Muon(
            parts["muon"], lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(parts["adamw"], fused=True, **ADAMW),
    ]
    before = [p.clone() for p in one.parameters()]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step))
        for each in (together, *alone)
    ]
    for step in range(3):
        gradients(one, step)
        gradients(two, step)
        together.step()
        for each in alone:
            each.step()
        for schedule in schedules:
            schedule.step()
    assert schedules[0].get_last_lr() == [1e-2 / 4] * 2
    for ours, theirs, old in zip(one.parameters(), two.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, old)


def test_a_step_of_muon_is_as_long_as_one_of_adamw():
    """Root mean square .2 of the rate (arXiv:2502.16982, section 2.2); the orthogonalisation of
    torch leaves singular values between about .7 and 1.2."""
    net = small(hidden_size=64)
    optimizer = build_optimizer(net, OptimizerSettings({**ADAMW, "weight_decay": 0}, 0.9), False)
    before = [p.clone() for p in matrices(net)]
    gradients(net, 1)
    optimizer.step()
    for p, old in zip(matrices(net), before, strict=True):
        moved = float((p - old).detach().square().mean().sqrt())
        assert moved == pytest.approx(0.2 * 1e-2, rel=0.3)


def test_a_state_that_is_loaded_goes_on_to_the_same_bits():
    one, two = small(), small()
    first, second = (build_optimizer(net, BOTH, fused=True) for net in (one, two))
    gradients(one, 1)
    first.step()
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for net, optimizer in ((one, first), (two, second)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3  # as a schedule does
        gradients(net, 2)
        optimizer.step()
    for ours, theirs in zip(two.parameters(), one.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    a, b = first.state_dict()["state"], second.state_dict()["state"]
    assert a.keys() == b.keys() == set(range(len(list(one.parameters()))))
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(algo, tmp_path):
    whole = trained(algo, tmp_path / "a", 4, save_every=2, momentum=0.9)
    path = str(tmp_path / "a" / "step=2.ckpt")
    resumed = trained(algo, tmp_path / "b", 4, resume=path, momentum=0.9)
    assert isinstance(resumed.optimizers().optimizer, MuonAdamW)
    for (name, ours), theirs in zip(
        resumed.backbone.named_parameters(), whole.backbone.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert torch.equal(resumed.ema.shadow[name], whole.ema.shadow[name]), name


def test_a_bad_step_changes_no_weight_and_no_moment(tmp_path, monkeypatch):
    """Steps 2 and 3 of four have a gradient that is not finite: the run is as if they were not."""
    seen, clip = [], type(module("mdlm")).configure_gradient_clipping

    def spoiled(self, optimizer, **limits):
        if self.trainer.global_step in (1, 2):
            matrices(self.backbone)[0].grad[0, 0] = torch.nan
        clip(self, optimizer, **limits)
        state = optimizer.state_dict()["state"]
        kept = [x.clone() for each in state.values() for x in each.values()]
        seen.append([p.detach().clone() for p in self.backbone.parameters()] + kept)

    monkeypatch.setattr(type(module("mdlm")), "configure_gradient_clipping", spoiled)
    m = trained("mdlm", tmp_path, 4, momentum=0.9)
    assert m.health.bad_steps == 2
    assert not m.health.late
    assert m.ema.num_updates == 2
    assert len(seen[1]) == len(seen[2]) == len(seen[3])
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[3], strict=True))


# ---- what a checkpoint must hold


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(module, optimizer states of its checkpoint, those of a run by AdamW)."""
    folder = tmp_path_factory.mktemp("muon")
    m = trained("bamdlm", folder / "muon", 1, save_every=1, momentum=0.9)
    other = trained("bamdlm", folder / "adamw", 1, save_every=1)
    states = []
    for name in ("muon", "adamw"):
        path = folder / name / "step=1.ckpt"
        states.append(torch.load(path, weights_only=True)["optimizer_states"])
        found = read_checkpoint(str(path)).optimizer
        assert found[0]["state"].keys() == states[-1][0]["state"].keys()
    return m, other, *states


def test_its_own_state_is_taken_and_that_of_another_optimizer_is_not(saved):
    m, other, by_muon, by_adamw = saved
    resuming.check_optimizer(by_muon, m)
    resuming.check_optimizer(by_adamw, other)
    for states, theirs in ((by_muon, other), (by_adamw, m)):
        with pytest.raises(resuming.CheckpointError, match="groups of parameters"):
            resuming.check_optimizer(states, theirs)


def at(*keys):
    def change(states, value):
        node = states
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value(node[keys[-1]]) if callable(value) else value

    return change


GROUP, STATE = (0, "param_groups", 0), (0, "state", 0)
BROKEN = {
    "a moment of another shape": (at(*STATE, "momentum_buffer"), torch.zeros(3)),
    "a moment of text": (at(*STATE, "momentum_buffer"), "x"),
    "half a moment": (at(*STATE, "momentum_buffer"), lambda x: x.half()),
    "a transposed moment": (
        at(*STATE, "momentum_buffer"),
        lambda x: torch.zeros(x.shape[::-1]).t(),
    ),
    "a state of AdamW": (at(*STATE), {"step": torch.ones(())}),
    "steps without end": (at(*GROUP, "ns_steps"), 10**9),
    "other coefficients": (at(*GROUP, "ns_coefficients"), (1.0, 2.0)),
    "a tensor as eps": (at(*GROUP, "eps"), torch.ones(3)),
    "a rate of text": (at(*GROUP, "lr"), "fast"),
    "a rate of nan": (at(*GROUP, "lr"), float("nan")),
    "one setting more": (at(*GROUP, "maximize"), True),
    "other weights": (at(*GROUP, "params"), lambda x: x[::-1]),
    "one group": (at(0, "param_groups"), lambda x: x[:1]),
    "betas of text": (at(0, "param_groups", 1, "betas"), "x"),
}


@pytest.mark.parametrize(("change", "value"), BROKEN.values(), ids=BROKEN)
def test_no_run_goes_on_from_it(change, value, saved):
    m, _, states, _ = saved
    states = copy.deepcopy(states)
    change(states, value)
    with pytest.raises(resuming.CheckpointError, match="optimizer"):
        resuming.check_optimizer(states, m)


def test_the_vocabulary_is_not_orthogonalised():
    """Nor the head: both have a row per token."""
    net = small(vocab_size=MASK + 1)
    assert all(MASK + 1 not in p.shape for p in matrices(net))
