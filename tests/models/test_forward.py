"""The network against recordings, and what one forward pass promises."""

import pytest
import torch
from conftest import load, load_json
from networks import (
    BLOCKWISE,
    CHECKPOINTS,
    LOGITS,
    MASK,
    architecture,
    assert_within,
    recorded,
    recorded_weights,
    small,
    texts,
    without_mask,
)

from models.dit import DiT
from models.layers import Rotary, rotate
from models.masks import BlockCausal, BlockDiffusion, Causal, Full
from noise_schedule import LogLinear
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.sedd import ScoreEntropy


def rule_of(name):
    entry = CHECKPOINTS[name]
    rules = {"bd3lm": BlockDiffusion(entry["block_size"]), "ar": Causal()}
    return rules.get(entry["algo"], Full())


def denoiser_of(name, net):
    entry = CHECKPOINTS[name]
    if entry["algo"] == "ar":
        return Autoregressive(MASK).denoiser(net)
    whole = entry["algo"] == "mdlm"
    return MaskedDiffusion(MASK, entry["block_size"], LogLinear(), whole_window=whole).denoiser(net)


def sigma_of(name, golden):
    """What the reference feeds after its own processing: zeros unless sedd."""
    return golden["processed_sigma"] if CHECKPOINTS[name]["algo"] == "sedd" else None


def everywhere(tokens):
    return torch.arange(tokens.shape[1]).expand_as(tokens)


# ---- recordings


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_logits_are_the_recorded_ones(name):
    golden, net = load(f"forward/{name}.safetensors"), recorded(name)
    tokens = golden.get("input_ids", golden["x0"])
    sigma = sigma_of(name, golden)
    hidden = net.hidden(tokens, sigma, attention_mask=rule_of(name))
    assert_within(net.logits(hidden, sigma), golden["backbone_logits"], LOGITS, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_logits_on_a_gpu_are_the_recorded_ones(cuda, name, record_property):
    """In float32, and in bfloat16 to a few roundings of its own."""
    golden = {key: x.to(cuda) for key, x in load(f"forward/{name}.safetensors").items()}
    net, sigma = recorded(name).to(cuda), sigma_of(name, golden)
    tokens = golden.get("input_ids", golden["x0"])
    for dtype, limit in ((torch.float32, LOGITS), (torch.bfloat16, 0.03)):
        with torch.autocast(cuda.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = net.logits(net.hidden(tokens, sigma, attention_mask=rule_of(name)), sigma)
        gap = assert_within(logits.float(), golden["backbone_logits"], limit, name)
        record_property(f"recorded logits in {str(dtype).removeprefix('torch.')}", gap)


@pytest.mark.parametrize("name", [n for n, e in CHECKPOINTS.items() if e["algo"] != "sedd"])
@torch.no_grad()
def test_log_probabilities_are_the_recorded_ones(name):
    """Masked positions only: at a visible one the reference answers with a point mass, which is
    for the sampler to know. The mask column is -inf here and -1e6 there."""
    golden, net = load(f"forward/{name}.safetensors"), recorded(name)
    answered = golden["diffusion_out"]
    shown = answered.shape[1]
    logits = net.logits(
        net.hidden(golden.get("input_ids", golden["x0"]), attention_mask=rule_of(name))
    )
    logits[..., MASK] = -torch.inf
    ours = logits.log_softmax(-1)[:, :shown]
    if CHECKPOINTS[name]["algo"] == "ar":
        asked = torch.ones(answered.shape[:2], dtype=torch.bool)
    else:
        asked = golden["xt"][:, :shown] == MASK
        visible = answered[~asked].argmax(-1)
        assert torch.equal(visible, golden["xt"][:, :shown][~asked])
    assert asked.any()
    assert_within(without_mask(ours[asked]), without_mask(answered[asked]), LOGITS, name)


@pytest.mark.parametrize("name", BLOCKWISE)
@torch.no_grad()
def test_the_sampling_form_is_the_recorded_one(name):
    golden, net = load(f"forward/{name}.safetensors"), recorded(name)
    block_size = CHECKPOINTS[name]["block_size"]
    denoise = denoiser_of(name, net)
    cases = {key.split(".")[1] for key in golden if key.startswith("sample.")}
    assert cases
    for case in cases:
        tokens = golden[f"sample.{case}.input_ids"]
        last = slice(tokens.shape[1] - block_size, None)
        logits = net.logits(net.hidden(tokens, attention_mask=BlockCausal(block_size)))[:, last]
        assert_within(logits, golden[f"sample.{case}.backbone_last_block"], LOGITS, case)
        hidden = tokens[:, last] == MASK
        answered = golden[f"sample.{case}.last_block_out"]
        if not hidden.any():
            continue  # a block of one whose token is visible
        ours = denoise(tokens, everywhere(tokens)[:, last])
        assert_within(without_mask(ours[hidden]), without_mask(answered[hidden]), LOGITS, case)


@torch.no_grad()
def test_the_score_of_sedd_is_the_recorded_one():
    for name in (n for n, e in CHECKPOINTS.items() if e["algo"] == "sedd"):
        golden = load(f"forward/{name}.safetensors")
        score = ScoreEntropy(MASK, LogLinear()).denoiser(recorded(name))
        ours = score(golden["input_ids"], golden["processed_sigma"])
        assert_within(ours, golden["diffusion_out"], LOGITS, name)


@pytest.mark.parametrize("name", [n for n, e in CHECKPOINTS.items() if e["algo"] != "ar"])
@torch.no_grad()
def test_a_batch_of_one_gets_the_recorded_answer_and_that_of_its_batch(name):
    golden, net = load(f"forward/{name}.safetensors"), recorded(name)
    tokens, sigma = golden["input_ids"], sigma_of(name, golden)
    first = None if sigma is None else sigma[:1]
    one = net.hidden(tokens[:1], first, attention_mask=rule_of(name))
    assert_within(one, net.hidden(tokens, sigma, attention_mask=rule_of(name))[:1], LOGITS)
    answered = golden["one.diffusion_out"]
    shown = answered.shape[1]
    asked = golden["xt"][:1, :shown] == MASK
    if CHECKPOINTS[name]["algo"] == "sedd":
        ours = ScoreEntropy(MASK, LogLinear()).denoiser(net)(tokens[:1], first)[:, :shown]
    else:
        logits = net.logits(one)
        logits[..., MASK] = -torch.inf
        ours = logits.log_softmax(-1)[:, :shown]
    if asked.any():
        assert_within(without_mask(ours[asked]), without_mask(answered[asked]), LOGITS, name)


@torch.no_grad()
def test_the_exported_model_gives_the_recorded_hidden_states_and_logits():
    golden, config = load("hf_export/golden.safetensors"), load_json("hf_export/config.json")
    weights = load("hf_export/model.safetensors")
    prefix = "backbone."  # the rest are the bounds of the training interval
    net = DiT(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_dim"],
        cond_dim=config["cond_dim"],
        n_blocks=config["n_blocks"],
        n_heads=config["n_heads"],
        dropout=config["dropout"],
    ).eval()
    net.load_state_dict(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    )
    seen = []
    for part in (net.vocab_embed, *net.blocks):
        part.register_forward_hook(lambda module, args, output: seen.append(output))
    tokens = torch.cat([golden["xt"], golden["x0"]], 1)
    hidden = net.hidden(tokens, attention_mask=BlockDiffusion(config["block_size"]))
    assert_within(net.logits(hidden), golden["train.logits"], LOGITS)
    length = golden["xt"].shape[1]
    for i, state in enumerate(seen):
        assert_within(state[:, :length], golden[f"train.hidden.{i}"], LOGITS, f"hidden {i}")
    for case in {key.split(".")[1] for key in golden if key.startswith("sample.")}:
        tokens = golden[f"sample.{case}.input_ids"]
        logits = net.logits(net.hidden(tokens, attention_mask=BlockCausal(config["block_size"])))
        assert_within(logits, golden[f"sample.{case}.logits"], LOGITS, case)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_have_the_published_names_shapes_and_order(name):
    ours = DiT(**architecture(CHECKPOINTS[name]["algo"])).state_dict()
    published = recorded_weights(name)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in published.items()}
    order = load_json("checkpoints/info.json")[name]["ema_order"]
    parameters = [n for n, _ in DiT(**architecture(CHECKPOINTS[name]["algo"])).named_parameters()]
    assert [f"backbone.{n}" for n in parameters] == order


# ---- what a pass promises


@pytest.mark.parametrize(
    "mask", [Full(), Causal(), BlockCausal(4), BlockCausal(4, 8), BlockDiffusion(4)], ids=repr
)
@torch.no_grad()
def test_reading_some_rows_gives_what_reading_all_gives(mask):
    net, tokens = small(), texts(3, 24, 7)
    sigma = torch.tensor([0.1, 1.0, 3.0])
    full = net.hidden(tokens, sigma, attention_mask=mask)
    rows = full.shape[1]
    assert rows == (12 if isinstance(mask, BlockDiffusion) else 24)
    read = torch.tensor([0, 5, rows - 1, rows, 2 * rows + 3, 1])
    some = net.hidden(tokens, sigma, attention_mask=mask, read=read)
    assert_within(some, full.flatten(0, 1)[read], LOGITS)
    logits = net.logits(some, sigma, row=read // rows)
    assert_within(logits, net.logits(full, sigma).flatten(0, 1)[read], LOGITS)


@torch.no_grad()
def test_reading_nothing_is_allowed():
    net = small()
    nothing = torch.empty(0, dtype=torch.int64)
    hidden = net.hidden(texts(2, 8, 7), attention_mask=BlockDiffusion(2), read=nothing)
    assert net.logits(hidden).shape == (0, 7)


@torch.no_grad()
def test_no_noise_level_means_zero_everywhere():
    net, tokens = small(), texts(3, 8, 7)
    left_out = net.hidden(tokens, attention_mask=Full())
    assert_within(left_out, net.hidden(tokens, torch.zeros(3), attention_mask=Full()), LOGITS)
    assert not torch.allclose(left_out, net.hidden(tokens, torch.ones(3), attention_mask=Full()))


@torch.no_grad()
def test_rows_have_noise_levels_of_their_own():
    net, tokens = small(), texts(2, 8, 7)
    sigma = torch.tensor([0.2, 2.0])
    both = net.logits(net.hidden(tokens, sigma, attention_mask=Full()), sigma)
    for i in range(2):
        one = net.logits(
            net.hidden(tokens[i : i + 1], sigma[i : i + 1], attention_mask=Full()), sigma[i : i + 1]
        )
        assert_within(one, both[i : i + 1], LOGITS)


def test_a_fresh_network_says_nothing():
    """The output layer and every modulation start at zero: uniform predictions, closed gates."""
    torch.manual_seed(0)
    net = DiT(vocab_size=7, hidden_size=16, cond_dim=8, n_blocks=2, n_heads=2)
    hidden = net.hidden(texts(2, 8, 7), attention_mask=Full())
    torch.testing.assert_close(hidden, net.vocab_embed(texts(2, 8, 7)))
    assert (net.logits(hidden) == 0).all()


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    net = small(seed=1)
    for block in net.blocks:
        block.dropout = 0.5
    tokens = texts(2, 8, 7)
    plain = net.hidden(tokens, attention_mask=Full())
    torch.testing.assert_close(net.hidden(tokens, attention_mask=Full()), plain)
    net.train()
    assert not torch.allclose(net.hidden(tokens, attention_mask=Full()), plain)


@torch.no_grad()
def test_the_causal_network_has_no_noise_level():
    net = small(adaln=False)
    assert not [name for name in net.state_dict() if "sigma" in name or "adaLN" in name]
    tokens = texts(2, 8, 7)
    hidden = net.hidden(tokens, attention_mask=Causal())
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 7
    after = net.hidden(changed, attention_mask=Causal())
    assert_within(hidden[:, :5], after[:, :5], LOGITS)
    assert not torch.allclose(hidden[:, 5:], after[:, 5:])


@torch.no_grad()
def test_attention_knows_differences_of_positions_only():
    net, tokens = small(), texts(2, 12, 7)
    here = net.hidden(tokens, attention_mask=BlockCausal(4))
    far = net.hidden(tokens, attention_mask=BlockCausal(4), positions=torch.arange(12) + 500)
    assert_within(far, here, LOGITS)


def test_rotation_turns_halves_by_the_angle_of_the_position():
    """Base 10 000, pairs (i, i + D/2) as in GPT-NeoX; angles still right at position 131 000."""
    width, positions = 8, torch.tensor([0, 1, 7, 131_000])
    x = torch.randn(1, 1, 4, width, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *Rotary(width)(positions[None]))
    for n, position in enumerate(positions.tolist()):
        for i in range(width // 2):
            frequency = float(Rotary(width).inv_freq[i].double())
            angle = torch.tensor(position * frequency, dtype=torch.float64)
            a, b = x[0, 0, n, i].double(), x[0, 0, n, i + width // 2].double()
            expected = torch.stack(
                [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
            )
            got = turned[0, 0, n, [i, i + width // 2]].double()
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            assert frequency == pytest.approx(10_000 ** (-2 * i / width), rel=1e-6)


@pytest.mark.parametrize(("width", "heads"), [(10, 4), (6, 2)])
def test_a_width_that_heads_cannot_share_is_refused(width, heads):
    with pytest.raises(ValueError, match=f"model.hidden_size={width} must be an even multiple"):
        DiT(vocab_size=5, hidden_size=width, cond_dim=4, n_blocks=1, n_heads=heads)


@pytest.mark.parametrize("adaln", [True, False])
def test_everything_that_a_block_adds_is_dropped_out(adaln):
    net, tokens = small(adaln=adaln), texts(2, 8, 7)
    for block in net.train().blocks:
        block.dropout = 1.0
    hidden = net.hidden(tokens, attention_mask=Full())
    assert torch.equal(hidden, net.vocab_embed(tokens))
