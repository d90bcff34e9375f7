"""The losses against recordings, and the fused last layer against plain autograd.

Every recorded case is fed its own x_t and t, so nothing random is left.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import load, load_json
from networks import (
    CHECKPOINTS,
    GRADIENTS,
    LENGTH,
    LOGITS,
    MASK,
    assert_within,
    loss_at,
    recorded,
    small,
    texts,
)

from noise_schedule import EPS, LogLinear, NoiseLevel, ScaledLogLinear
from objectives import head
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import Noise, shares_within
from objectives.head import cross_entropy, head_loss
from objectives.sedd import ScoreEntropy, score_entropy

CASES = load_json("loss/index.json")["cases"]
FULL = (EPS, 1.0)
DIFFUSION = [c for c in CASES if CHECKPOINTS[CASES[c]["checkpoint"]]["algo"] != "ar"]


def interval_of(case):
    """The bounds in force: the argument, else the buffers; without buffers the full interval
    (which is what the recorded times were drawn from)."""
    info = CASES[case]
    if info.get("sampling_eps_buffers") is None:
        return FULL
    lo, hi = info["eps_argument"] or info["sampling_eps_buffers"]
    return (lo, hi)


@dataclasses.dataclass(frozen=True)
class ConstantWeight:
    """p = t with weight 1: the recorded, faulty weight of intervals that begin above 1/2."""

    def __call__(self, t):
        return NoiseLevel(p=t, weight=torch.ones_like(t))


def jumps(case):
    """Mended: from eps_min > 1/2 on the reference's weight is 1 (meant for the exact NLL only)."""
    lo, hi = interval_of(case)
    return lo > 0.5 and (lo, hi) != (1, 1)


def objective_of(case):
    info = CASES[case]
    entry = CHECKPOINTS[info["checkpoint"]]
    overrides = info["overrides"]
    ignore_bos = entry["algo"] != "ar"
    if "algo.ignore_bos=false" in overrides:
        ignore_bos = False
    if "algo.ignore_bos=true" in overrides:
        ignore_bos = True
    if entry["algo"] == "ar":
        return Autoregressive(MASK, ignore_bos)
    scaled = "algo.mdlm_loss_scale=true" in overrides
    schedule = ScaledLogLinear() if scaled else LogLinear()
    if jumps(case):
        schedule = ConstantWeight()
    if entry["algo"] == "sedd":
        return ScoreEntropy(MASK, schedule, ignore_bos)
    resample = "training.resample=true" in overrides
    return MaskedDiffusion(MASK, entry["block_size"], schedule, ignore_bos, resample)


def times_of(golden, block_size):
    """One t per block [B, N]; recorded per token, or [B, 1] where a row shares one."""
    t = golden["t"]
    return t if t.shape[1] == 1 else t[:, ::block_size]


def clean(golden):
    """x0; of the crop_* cases, whose rows are two windows wide, the recorded window."""
    return golden.get("crop.input_tokens", golden["x0"])


def loss_of(case, golden, net):
    objective, training = objective_of(case), CASES[case]["training"]
    if isinstance(objective, Autoregressive):
        if "crop.input_tokens" in golden:  # inputs and targets are recorded, one token apart
            x0 = torch.cat([golden["crop.input_tokens"], golden["crop.output_tokens"][:, -1:]], 1)
            return objective.loss(net, x0, torch.ones_like(x0), training=training)
        return objective.loss(net, golden["x0"], golden["attention_mask_in"], training=training)
    x0 = clean(golden)
    mask = golden["attention_mask_in"][:, : x0.shape[1]]
    loss_mask = objective.loss_mask(mask, training)
    x_t = golden["model_input"][:, : x0.shape[1]]
    t = times_of(golden, getattr(objective, "block_size", LENGTH))
    if isinstance(objective, ScoreEntropy):
        return loss_at(objective, net, x0, x_t, t, loss_mask)
    return loss_at(objective, net, x0, x_t, t, loss_mask, interval=interval_of(case))


# ---- recordings


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_recorded_ones(case):
    """`*_eps1_*`: the recorded weight is 1, a mended fault; there the constant weight is fed in,
    and the next test holds the mended one against it."""
    golden = load(f"loss/{case}.safetensors")
    net = recorded(CASES[case]["checkpoint"])
    loss = loss_of(case, golden, net)
    assert_within(loss.nll, golden["nlls"], LOGITS, "nats")
    assert torch.equal(loss.loss_mask, golden["token_mask"])
    assert_within(loss.mean, golden["loss"], LOGITS, "mean")
    if not CASES[case].get("has_grads"):
        return
    loss.mean.backward()
    parameters = dict(net.named_parameters())
    checked = [key for key in golden if key.startswith("grad.")]
    assert checked
    for key in checked:
        ours, theirs = parameters[key.removeprefix("grad.backbone.")].grad, golden[key]
        assert (ours - theirs).norm() <= GRADIENTS * theirs.norm(), key
    norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    assert abs(norm - golden["grad_global_norm"]) <= GRADIENTS * golden["grad_global_norm"]


@pytest.mark.parametrize("case", [c for c in DIFFUSION if jumps(c)])
def test_the_weight_does_not_jump_above_one_half(case):
    golden = load(f"loss/{case}.safetensors")
    net, objective = recorded(CASES[case]["checkpoint"]), objective_of(case)
    mended = dataclasses.replace(objective, schedule=LogLinear())
    size = golden["x0"].shape[1]
    loss_mask = objective.loss_mask(golden["attention_mask_in"], CASES[case]["training"])
    t = times_of(golden, objective.block_size)
    arguments = (net, golden["x0"], golden["model_input"][:, :size], t, loss_mask)
    loss = loss_at(mended, *arguments, interval=interval_of(case))
    assert_within(loss.nll * golden["t"], golden["nlls"], LOGITS)


@pytest.mark.parametrize("case", DIFFUSION)
def test_recorded_draws_give_the_recorded_corruption(case):
    """The noise of the recording, fed as `Noise`, gives its x_t. With resampling only the law is
    the same (test_corruption): here every block's share lies inside the bounds, theirs and ours."""
    golden, objective = load(f"loss/{case}.safetensors"), objective_of(case)
    noise = [golden[key] for key in sorted(golden) if key.startswith("draw.") and "rand" in key]
    token = noise[1]  # the first are the times, any further ones rounds of resampling
    x0 = clean(golden)
    lo, hi = interval_of(case)
    t = times_of(golden, getattr(objective, "block_size", LENGTH))
    u = (t - lo) / (hi - lo) if hi > lo else torch.zeros_like(t)
    plain = objective
    if isinstance(objective, MaskedDiffusion):
        plain = dataclasses.replace(objective, resample=False)
    noise = Noise(time=u, token=token, count=torch.full_like(t, 0.5))
    x_t, t_again = plain.corrupt(x0, noise, (lo, hi))
    torch.testing.assert_close(t_again, t)
    if plain == objective:
        assert torch.equal(x_t, golden["model_input"][:, : x0.shape[1]])
        return
    lo = 0.0 if lo == EPS else lo
    fits = shares_within(objective.block_size, (lo, hi))
    bounded = dataclasses.replace(objective, ignore_bos=False)
    for hidden in (golden["xt_from_q"], bounded.corrupt(x0, noise, interval_of(case))[0]):
        per_block = (hidden == MASK).unflatten(1, (-1, objective.block_size)).sum(-1)
        assert fits[per_block].all()


@pytest.mark.parametrize("case", ["mdlm_eval", "ar_eval_ignore_bos"])
def test_the_callers_attention_mask_is_left_alone(case):
    """The reference writes into it (recorded as attention_mask_after)."""
    golden = load(f"loss/{case}.safetensors")
    mask = golden["attention_mask_in"].clone()
    loss_of(case, golden, recorded(CASES[case]["checkpoint"]))
    assert torch.equal(golden["attention_mask_in"], mask)
    assert not torch.equal(golden["attention_mask_after"], mask)


# ---- the fused last layer


def plain_cross_entropy(logits, target, mask_id):
    logits = logits.masked_fill(torch.arange(logits.shape[1]) == mask_id, -torch.inf)
    return F.cross_entropy(logits, target, reduction="none")


def plain_score_entropy(logits, target, expm1, mask_id):
    log_score = logits - torch.log(expm1 * (logits.shape[1] - 1))[:, None]
    others = torch.arange(logits.shape[1]) != mask_id
    ratio = 1 / expm1
    positive = log_score[:, others].exp().sum(-1)
    negative = ratio * log_score.gather(1, target[:, None])[:, 0]
    return positive - negative + ratio * (ratio.log() - 1)


KERNELS = {
    "cross-entropy": (cross_entropy, plain_cross_entropy, 0),
    "score entropy": (score_entropy, plain_score_entropy, 1),
}


def kernel_of(name, net):
    objective = ScoreEntropy(6, LogLinear()) if name == "score entropy" else Autoregressive(6)
    return objective.kernel(net)


def extra_rows(rows, dtype=torch.float32):
    return (torch.linspace(0.05, 30, rows, dtype=dtype),)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_knows_its_own_gradient(name):
    kernel, plain, extras = KERNELS[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    target = texts(1, 20, 8)[0]
    rows = extra_rows(20, torch.float64)[:extras]
    expected = plain(logits, target, *rows, mask_id=8)
    (slope,) = torch.autograd.grad(expected.sum(), logits)
    overwritten = logits.detach().clone()
    nll = kernel(overwritten, target, True, *rows, mask_id=8)
    torch.testing.assert_close(nll, expected.detach())
    torch.testing.assert_close(overwritten, slope)
    quiet = kernel(logits.detach().clone(), target, False, *rows, mask_id=8)
    torch.testing.assert_close(quiet, nll)


def through_head(net, name, chunk, monkeypatch, autocast=False):
    """nats, loss and gradients of the fused head on 50 rows."""
    extras = KERNELS[name][2]
    monkeypatch.setattr(head, "CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(50, 16, generator=generator, requires_grad=True)
    target, factors = texts(1, 50, 6)[0], torch.rand(50, generator=generator)
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = head_loss(
            net,
            hidden,
            target,
            factors,
            kernel_of(name, net),
            *extra_rows(50)[:extras],
        )
    (3 * loss.total).backward()
    linear = net.output_layer.linear
    scale = net.output_layer.norm_final.weight
    return (
        loss,
        [hidden.grad, linear.weight.grad, linear.bias.grad, scale.grad],
        (
            hidden,
            target,
            factors,
        ),
    )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("chunk", [1, 7 * 13, 1 << 24])
def test_the_fused_head_is_the_plain_one_forward_and_backward(name, chunk, monkeypatch):
    net = small()
    loss, gradients, (hidden, target, factors) = through_head(net, name, chunk, monkeypatch)
    _, plain, extras = KERNELS[name]
    net.zero_grad()
    hidden = hidden.detach().requires_grad_()
    logits = net.logits(hidden)
    losses = plain(logits, target, *extra_rows(50)[:extras], mask_id=6)
    total = (losses * factors).sum()
    (3 * total).backward()
    linear, scale = net.output_layer.linear, net.output_layer.norm_final.weight
    assert_within(loss.losses, losses.detach(), LOGITS)
    assert_within(loss.total.detach(), total.detach(), LOGITS)
    expected = [hidden.grad, linear.weight.grad, linear.bias.grad, scale.grad]
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() <= GRADIENTS * theirs.norm()


@pytest.mark.parametrize("name", KERNELS)
def test_the_fused_head_in_bfloat16_is_close_to_float32(name, monkeypatch):
    exact, gradients, _ = through_head(small(), name, 91, monkeypatch)
    half, rough, _ = through_head(small(), name, 91, monkeypatch, autocast=True)
    assert half.losses.dtype == torch.float32
    assert_within(half.losses, exact.losses, 0.03)
    for ours, theirs in zip(rough, gradients, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()


def test_a_training_step_in_bfloat16_is_close_to_float32():
    x0 = texts(4, 16, 6)
    objective = MaskedDiffusion(6, 4, LogLinear())
    generator = torch.Generator().manual_seed(0)
    noise = Noise(*(torch.rand(s, generator=generator) for s in ((4, 4), (4, 16), (4, 4))))
    results = []
    for autocast in (False, True):
        net = small()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = objective.loss(net, x0, torch.ones_like(x0), noise, interval=FULL, training=True)
        loss.mean.backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
        results.append((loss.mean.detach(), gradient))
    assert_within(results[1][0], results[0][0], 0.03)
    assert (results[1][1] - results[0][1]).norm() <= 0.05 * results[0][1].norm()


def test_without_gradients_the_head_keeps_none(monkeypatch):
    net = small()
    with torch.no_grad():
        loss = head_loss(
            net,
            torch.randn(5, 16),
            texts(1, 5, 6)[0],
            torch.ones(5),
            kernel_of("cross-entropy", net),
        )
    assert not loss.total.requires_grad


# ---- what counts


OBJECTIVES = {
    "bamdlm": MaskedDiffusion(6, 4, LogLinear()),
    "mdlm": MaskedDiffusion(6, 12, LogLinear(), whole_window=True),
    "sedd": ScoreEntropy(6, LogLinear()),
    "ar": Autoregressive(6),
}


def any_loss(objective, net, x0, mask, *, training=True, document_ids=None):
    if isinstance(objective, Autoregressive):
        return objective.loss(net, x0, mask, training=training, document_ids=document_ids)
    blocks = x0.shape[1] // getattr(objective, "block_size", x0.shape[1])
    generator = torch.Generator().manual_seed(5)
    shapes = ((len(x0), blocks), x0.shape, (len(x0), blocks))
    noise = Noise(*(torch.rand(s, generator=generator) for s in shapes))
    arguments = {"interval": FULL, "training": training, "document_ids": document_ids}
    return objective.loss(net, x0, mask, noise, **arguments)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_changes_nothing_whatever_its_id(name):
    """GPT-2's padding has the id of the mask, so every padded place looks hidden."""
    net, objective = small(adaln=name != "ar"), OBJECTIVES[name]
    x0 = texts(3, 12, 6)
    mask = torch.ones_like(x0)
    mask[0, 7:] = 0
    mask[2, 3:] = 0
    found = []
    for padding in (0, 6):
        padded = torch.where(mask == 1, x0, padding)
        net.zero_grad()
        loss = any_loss(objective, net, padded, mask, document_ids=mask)
        loss.mean.backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
        assert gradient.isfinite().all()
        found.append((loss.nll, loss.mean.detach(), gradient))
    for one, other in zip(*found, strict=True):
        assert_within(one, other, LOGITS)
    assert (found[0][0] * (1 - mask[:, -found[0][0].shape[1] :]) == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_mean_is_over_counted_tokens(name):
    net, objective = small(adaln=name != "ar"), OBJECTIVES[name]
    x0 = texts(3, 12, 6)
    mask = torch.ones_like(x0)
    mask[1, 5:] = 0
    loss = any_loss(objective, net, x0, mask)
    assert_within(loss.mean.detach(), loss.nll.sum() / loss.loss_mask.sum(), LOGITS)
    assert (loss.nll[loss.loss_mask == 0] == 0).all()


@torch.no_grad()
def test_the_causal_loss_leaves_its_first_target_out_in_evaluation_only():
    net, x0 = small(adaln=False), texts(2, 12, 6)
    for ignore_bos, training, loss_mask in (
        (True, True, 22),
        (True, False, 20),
        (False, False, 22),
    ):
        objective = Autoregressive(6, ignore_bos)
        loss = objective.loss(net, x0, torch.ones_like(x0), training=training)
        assert loss.loss_mask.sum() == loss_mask


@pytest.mark.parametrize("name", OBJECTIVES)
@torch.no_grad()
def test_one_segment_is_no_segment(name):
    net, objective = small(adaln=name != "ar"), OBJECTIVES[name]
    x0, mask = texts(3, 12, 6), torch.ones(3, 12)
    plain = any_loss(objective, net, x0, mask)
    same = any_loss(objective, net, x0, mask, document_ids=torch.full_like(x0, 5))
    assert_within(same.nll, plain.nll, LOGITS)


@torch.no_grad()
def test_a_packed_document_costs_what_it_costs_alone():
    """Two documents of two blocks each in a row, each of its own segment."""
    net, objective = small(), OBJECTIVES["bamdlm"]
    x0, x_t, t = texts(3, 16, 6), texts(3, 16, 7, seed=1), torch.linspace(0.1, 1, 12).view(3, 4)
    document_ids = torch.arange(16).expand(3, -1) // 8
    settings = {"interval": FULL}
    packed = loss_at(
        objective, net, x0, x_t, t, torch.ones(3, 16), document_ids=document_ids, **settings
    )
    for first, blocks in ((0, slice(0, 2)), (8, slice(2, 4))):
        part = slice(first, first + 8)
        alone = loss_at(
            objective, net, x0[:, part], x_t[:, part], t[:, blocks], torch.ones(3, 8), **settings
        )
        assert_within(packed.nll[:, part], alone.nll, LOGITS)


def test_position_zero_counts_in_training_and_not_in_evaluation():
    mask = torch.ones(2, 12)
    for objective in (MaskedDiffusion(6, 4, LogLinear()), ScoreEntropy(6, LogLinear())):
        assert objective.loss_mask(mask, training=True).sum() == 24
        assert objective.loss_mask(mask, training=False).sum() == 22
        counting = dataclasses.replace(objective, ignore_bos=False)
        assert counting.loss_mask(mask, training=False).sum() == 24


def test_block_means_are_means_over_the_tokens_of_a_block():
    net = small()
    loss = any_loss(MaskedDiffusion(6, 4, LogLinear()), net, texts(2, 12, 6), torch.ones(2, 12))
    means = loss.block_means(4)
    by_hand = [[float(row[start : start + 4].mean()) for start in (0, 4, 8)] for row in loss.nll]
    assert_within(means, torch.tensor(by_hand), LOGITS)
    assert (means > 0).any()


@pytest.mark.parametrize("name", ["bamdlm", "mdlm"])
@torch.no_grad()
def test_a_denoiser_answers_with_normalised_log_probabilities(name):
    net, objective = small(), OBJECTIVES[name]
    denoise = objective.denoiser(net)
    tokens = texts(2, 12, 7)
    read = torch.tensor([[0, 11, 3], [7, 7, 1]])
    found = denoise(tokens, read)
    assert found.shape == (2, 3, 7)
    assert (found[..., 6] == -torch.inf).all()
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 3))
    everywhere = denoise(tokens, torch.arange(12).expand(2, 12))
    expected = everywhere.gather(1, read[..., None].expand(-1, -1, 7))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_denoiser_answers_the_same_with_a_cache():
    for objective in (MaskedDiffusion(6, 4, LogLinear()), Autoregressive(6)):
        net = small(adaln=not isinstance(objective, Autoregressive))
        denoise = objective.denoiser(net)
        size = denoise.block_size
        tokens, read = texts(2, 12, 7), torch.arange(12 - size, 12).expand(2, size)
        cache = denoise.new_cache(2, 12)
        for start in range(0, 12 - size, size):
            denoise(tokens[:, start : start + size], torch.zeros(2, 0, dtype=torch.int64), cache)
            cache = cache.commit(size)
        cached = denoise(tokens[:, 12 - size :], read - (12 - size), cache)
        torch.testing.assert_close(cached, denoise(tokens, read), rtol=1e-4, atol=1e-5)
