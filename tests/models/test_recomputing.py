"""model.activation_checkpointing: the same losses and gradients bit for bit, in less memory."""

import pytest
import torch
from networks import allocated, texts
from test_compile import traced  # noqa: F401  a fixture

import settings
from models.dit import DiT
from models.llama import Llama
from models.recomputing import ACTIVATION_CHECKPOINTING, Recompute
from modes.plan import Weights, most_kept, plan, report
from noise_schedule import EPS, get_schedule
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import draw_example_noise
from objectives.sedd import ScoreEntropy
from training.flops import NetworkShape, flops

MASK, LENGTH = 60, 32
SCHEDULE = get_schedule("loglinear")
OBJECTIVES = {
    "bamdlm": MaskedDiffusion(MASK, 8, SCHEDULE),
    "mdlm": MaskedDiffusion(MASK, LENGTH, SCHEDULE),
    "sedd": ScoreEntropy(MASK, SCHEDULE),
    "ar": Autoregressive(MASK),
    "llama": MaskedDiffusion(MASK, 8, SCHEDULE),
}
MODES = list(ACTIVATION_CHECKPOINTING)
LLAMA = {"n_heads": 2, "n_kv_heads": 1, "qk_norm": True}


def network(name, mode, *, n_blocks=5, width=16, **more):
    """With dropout, every weight random."""
    torch.manual_seed(1)
    shape = {"vocab_size": MASK + 1, "hidden_size": width, "n_blocks": n_blocks, "dropout": 0.3}
    if name == "llama":
        more |= LLAMA | {"head_dim": width // 2, "ffn_size": 4 * width}
        net = Llama(**shape, activation_checkpointing=mode, **more)
    else:
        more |= {"n_heads": 2, "cond_dim": 8, "adaln": name != "ar"}
        net = DiT(**shape, activation_checkpointing=mode, **more)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.train()


def batch(objective, rows=2, length=LENGTH):
    x0, ones = texts(rows, length, MASK), torch.ones(rows, length)
    if not objective.draws_noise:
        return objective.loss_inputs(x0, ones, training=True)
    size = objective.noise_block(length)
    noise = draw_example_noise(
        1, torch.arange(rows), global_batch=rows, length=length, block_size=size, antithetic=True
    )
    return objective.loss_inputs(x0, ones, noise, interval=(EPS, 1.0), training=True)


def step(name, mode, dtype=None, **more):
    """Loss, gradients and the state of the random numbers after a step."""
    net, objective = network(name, mode, **more), OBJECTIVES[name]
    inputs = batch(objective)
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = objective.compute_loss(net, inputs).per_place
    loss.backward()
    gradients = {key: p.grad for key, p in net.named_parameters()}
    return loss.detach(), gradients, torch.get_rng_state()


def same(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    for key, gradient in theirs[1].items():
        assert (gradient is None) == (ours[1][key] is None), key
        assert gradient is None or torch.equal(ours[1][key], gradient), key
    assert torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_the_same_bits(name, mode):
    same(step(name, mode), step(name, "none"))


@pytest.mark.parametrize("name", ["bamdlm", "llama"])
def test_they_are_the_same_bits_in_half_precision(name):
    same(step(name, "full", torch.bfloat16), step(name, "none", torch.bfloat16))


def test_compiled_they_are_the_same_too(traced):  # noqa: F811
    wanted = step("bamdlm", "none", compile=True)
    for mode in ("full", "selective"):
        same(step("bamdlm", mode, compile=True), wanted)
    assert traced  # by the compiler


def test_which_layers_are_made_again():
    again = {mode: Recompute(mode).layers(6) for mode in ACTIVATION_CHECKPOINTING}
    assert again == {"none": [], "full": [0, 1, 2, 3, 4], "selective": [1, 3]}
    assert Recompute("selective").layers(7) == [0, 2, 4]
    assert Recompute("full").layers(1) == []
    with pytest.raises(ValueError, match="must be one of none, full, selective, got 'half'"):
        Recompute("half")


@pytest.mark.parametrize("mode", ACTIVATION_CHECKPOINTING)
def test_each_of_them_runs_twice(mode):
    net, ran = network("bamdlm", mode), []
    for number, block in enumerate(net.blocks):
        block.register_forward_pre_hook(lambda _, __, number=number: ran.append(number))
    loss = OBJECTIVES["bamdlm"].compute_loss(net, batch(OBJECTIVES["bamdlm"])).per_place
    assert ran == [0, 1, 2, 3, 4]
    loss.backward()
    assert ran[5:] == Recompute(mode).layers(5)[::-1]
    del ran[:]
    with torch.no_grad():
        OBJECTIVES["bamdlm"].compute_loss(net, batch(OBJECTIVES["bamdlm"]))
    assert ran == [0, 1, 2, 3, 4]


def peak(name, mode, n_blocks, width, rows, length, size):
    """Bytes that a step allocates at most, gradients apart."""
    net = network(name, mode, n_blocks=n_blocks, width=width)
    objective = MaskedDiffusion(MASK, size, SCHEDULE)
    inputs = batch(objective, rows, length)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return allocated(lambda: objective.compute_loss(net, inputs).per_place.backward())


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, mode) for name in ("bamdlm", "llama") for mode in MODES), ("mdlm", "full")],
)
def test_the_plan_knows_the_memory(name, mode):
    """The most that a step takes, as it was measured: here on a CPU in float32."""
    n_blocks, width, rows, length = 8, 128, 2, 256
    size = length if name == "mdlm" else 16
    measured = peak(name, mode, n_blocks, width, rows, length, size)
    words = ["trainer.accelerator=cpu", f"loader.batch_size={rows}", "trainer.precision=32"]
    words += [f"model.activation_checkpointing={mode}", f"loader.global_batch_size={rows}"]
    algo, more = name, {}
    if name == "llama":
        algo, more = "bamdlm", {"query_width": width, "key_width": width // 2, "qk_norm": True}
        more["mlp_weights"] = 3 * width * 4 * width
    shape = NetworkShape(algo, width, n_blocks, MASK + 1, length, size, **more)
    config = settings.load(words)
    made = plan(config, shape, Weights(1))
    assert made.activations == pytest.approx(measured, rel=0.17)
    layers = len(Recompute(mode).layers(n_blocks))
    assert made.again == pytest.approx(layers * flops(shape).inner / flops(shape).step)
    assert made.hours(1e12) == pytest.approx(made.flops * (1 + made.again) / 1e12 / 3600)
    more = f"made again in the backward pass: {made.again:.0%} more FLOPs"
    assert (more in report(made, config)) == bool(layers)


def test_the_most_that_is_kept_by_hand():
    """Of 5 layers that keep 100, the last one 25; inputs are 4."""
    assert most_kept(5, [], 100, 0.25) == 425
    assert most_kept(5, [0, 1, 2, 3], 100, 0.25) == 4 * 4 + 100
    assert most_kept(5, [0, 2], 100, 0.25) == 2 * 4 + 225
    assert most_kept(1, [], 100, 0.25) == 25


def test_settings_say_what_it_excludes():
    words = ["model.activation_checkpointing=full", "wandb=null", "data=text8"]
    _, problems, _ = settings.examine([*words[:1], "model.activation_checkpointing=half"])
    assert any("must be one of none, full, selective" in each for each in problems)
    _, _, notes = settings.examine([*words, "mode=prepare"])
    assert "model.activation_checkpointing has no effect: mode=prepare has no back" in str(notes)
    config = settings.load([*words, "model.compile=true", "trainer.accelerator=cpu"])
    assert "CUDA graphs" not in str(settings.check(config)[1])
    config.trainer.accelerator = "gpu"
    assert "full: steps are not replayed as CUDA graphs" in str(settings.check(config)[1])
