"""models/lora.py: the same numbers merged and unmerged, in every kind of pass; what is trained."""

import copy

import pytest
import torch
from networks import GRADIENTS, LOGITS, assert_within, randomised, small, small_llama, texts
from test_compile import traced  # noqa: F401  a fixture
from test_recomputing import LENGTH, MASK, OBJECTIVES, batch, network
from torch.utils.flop_counter import FlopCounterMode

from models.lora import ADAPTED, Adapter, adapt, merged, of_adapter
from models.masks import BlockCausal, BlockDiffusion, Causal, Full
from modes.build import _layers, adapter_weights
from objectives.head import cross_entropy_kernel, head_loss
from training.flops import NetworkShape, flops
from training.optimizers import OptimizerSettings, build_optimizer, trained

VOCAB = 7
ADAPTER = Adapter(rank=2, alpha=6.0, mask_id=VOCAB - 1)
NETWORKS = {
    "dit": small,
    "dit without noise level": lambda **more: small(adaln=False, **more),
    "llama": small_llama,
    "llama, tied": lambda **more: small_llama(tied=True, **more),
}
MASKS = [Full(), Causal(), BlockCausal(4), BlockDiffusion(4), BlockDiffusion(4, views=2)]


def adapted(make, adapter=ADAPTER, **more):
    """The network with adapters, and one without that has its merged weights."""
    net, plain = make(**more), make(**more)
    adapt(net, adapter)
    randomised(net)
    plain.load_state_dict(merged(net.state_dict(), adapter))
    return net.eval(), plain


def asked(net, mask):
    tokens = texts(2, 24, VOCAB)
    sigma = torch.tensor([0.3, 1.0]) if getattr(net, "adaln", False) else None
    hidden = net.hidden(tokens, sigma, attention_mask=mask)
    return net.logits(hidden, sigma)[..., : VOCAB - 1]  # the mask is no word


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_merged_weights_compute_the_same(name, mask):
    net, plain = adapted(NETWORKS[name])
    found = asked(net, mask)
    assert_within(asked(plain, mask), found, LOGITS)
    untouched = asked(NETWORKS[name](), mask)
    assert (found - untouched).abs().max() > 100 * LOGITS * found.abs().max()


@pytest.mark.parametrize("name", ["dit", "llama, tied"])
@torch.no_grad()
def test_the_cache_knows_adapters(name):
    net, plain = adapted(NETWORKS[name])
    mask, tokens, found = BlockCausal(4, 24), texts(2, 24, VOCAB), {}
    for each in (net, plain):
        cache, parts = each.new_cache(2, 24, 4), []
        for block in tokens.split(4, 1):
            parts.append(each.hidden(block, attention_mask=mask, cache=cache))
            cache.commit(4)
        found[each] = torch.cat(parts, 1)
    assert_within(found[plain], found[net], LOGITS)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_adapter_begins_as_nothing(name):
    net = NETWORKS[name]()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    logits = asked(net, BlockDiffusion(4))
    adapt(net, ADAPTER)
    assert torch.equal(asked(net, BlockDiffusion(4)), logits)
    made = merged(net.state_dict(), ADAPTER)
    assert list(made) == list(before)
    assert all(torch.equal(made[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "modules", "count"),
    [
        ("llama", None, 7 * 3),
        ("llama", ("q_proj", "v_proj"), 2 * 3),
        ("llama", ("self_attn.o_proj", "down_proj"), 2 * 3),
        ("dit", None, 5 * 2),
        ("dit", ("attn_qkv", "mlp.2"), 2 * 2),
        ("dit without noise level", None, 4 * 2),
    ],
)
def test_a_step_changes_what_is_chosen_and_nothing_else(name, modules, count):
    net = NETWORKS[name]()
    adapt(net, Adapter(rank=2, alpha=4.0, modules=modules, mask_id=VOCAB - 1))
    randomised(net)
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    settings = OptimizerSettings({"lr": 1e-2, "weight_decay": 0.1})
    optimizer = build_optimizer(net, settings, fused=False)
    asked(net, BlockDiffusion(4)).square().sum().backward()
    optimizer.step()
    changed = {key for key, p in net.named_parameters() if not torch.equal(p, before[key])}
    assert changed == of_adapter(before).keys()
    assert len(changed) == 2 * count + 1  # A and B, and one row
    assert all(p.grad is None for key, p in net.named_parameters() if key not in changed)
    chosen = {key.rpartition(".")[0] for key in changed if "lora_" in key}
    ends = modules or ("",)
    assert all(module.endswith(ends) for module in chosen)


def test_no_row_is_trained_where_none_is_asked_for():
    net = small_llama()
    adapt(net, Adapter(rank=1, alpha=1.0))
    assert {name.rpartition(".")[2] for name, _ in trained(net)} == set(ADAPTED[:2])


def test_a_layer_that_is_not_there_is_named_with_those_that_are():
    net = small_llama()
    with pytest.raises(ValueError, match=r"is proj; known: self_attn\.q_proj, .*mlp\.down_proj$"):
        adapt(net, Adapter(rank=1, alpha=1.0, modules=("q_proj", "proj")))
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", ["bamdlm", "llama"])
def test_layers_that_are_made_again_draw_the_same_dropout(name):
    found = []
    for mode in ("none", "full"):
        net, objective = network(name, mode), OBJECTIVES[name]
        adapt(net, Adapter(rank=2, alpha=4.0, dropout=0.3, mask_id=MASK))
        randomised(net)
        torch.manual_seed(7)
        loss = objective.compute_loss(net, batch(objective)).per_place
        loss.backward()
        found.append((loss.detach(), {key: p.grad for key, p in trained(net)}))
    (loss, gradients), (again, theirs) = found
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[key], theirs[key]) for key in gradients)


@pytest.mark.parametrize("name", ["bamdlm", "llama"])
def test_compiled_layers_give_the_same(name, traced):  # noqa: F811
    found = []
    for by_compiler in (False, True):
        net, objective = (
            network(name, "none", n_blocks=2, compile=by_compiler).eval(),
            OBJECTIVES[name],
        )
        adapt(net, Adapter(rank=2, alpha=4.0, mask_id=MASK))
        randomised(net)
        hidden = net.hidden(
            batch(objective).tokens, attention_mask=BlockDiffusion(8), read=torch.arange(5)
        )
        hidden.square().sum().backward()
        found.append((hidden.detach(), {key: p.grad for key, p in trained(net)}))
    (hidden, gradients), (compiled, theirs) = found
    assert len(traced) > 0
    assert_within(compiled, hidden, LOGITS)
    for key, gradient in gradients.items():
        assert (theirs[key] - gradient).norm() <= GRADIENTS * gradient.norm(), key


def test_dropout_leaves_the_frozen_layer_alone():
    """Of what enters A alone, as in peft: with B = 0 the numbers are those without it."""
    net = small_llama()
    before = asked(net, Full())
    adapt(net, Adapter(rank=2, alpha=4.0, dropout=0.9))
    assert torch.equal(asked(net.train(), Full()), before)
    randomised(net)
    assert not torch.equal(asked(net, Full()), asked(net, Full()))
    assert torch.equal(asked(net.eval(), Full()), asked(net, Full()))


@pytest.mark.parametrize("make", [small, small_llama], ids=["with a bias", "without"])
def test_a_frozen_head_gives_the_same_gradient_to_what_is_before_it(make):
    hidden = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    targets, factors, found = texts(1, 9, VOCAB - 1)[0], torch.linspace(0, 1, 9), []
    for frozen in (False, True):
        net, x = make().requires_grad_(not frozen), hidden.clone().requires_grad_()
        kernel = cross_entropy_kernel(net, VOCAB - 1)
        head_loss(net, x, targets, factors, kernel).total.backward()
        found.append(x.grad)
        assert (net.head_weight.grad is None) == frozen
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["dit", "llama"])
def test_the_flop_model_counts_what_torch_counts(name):
    """Forward and backward without attention, of which the counter knows no mask. Between the two:
    modulation, and in the last layer keys and values, for whose adapters fewer rows are counted."""
    net, objective = network("mdlm" if name == "dit" else name, "none"), OBJECTIVES["mdlm"]
    adapt(net, Adapter(rank=4, alpha=1.0, mask_id=MASK))
    inputs = batch(objective, rows=4)
    with FlopCounterMode(display=False) as counter:
        objective.compute_loss(net, inputs).per_place.backward()
    products = ("aten.mm", "aten.addmm")
    counts = counter.get_flop_counts()["Global"]
    counted = sum(count for op, count in counts.items() if str(op) in products) / 4
    share = float((inputs.tokens == MASK).float().mean())
    sizes = {"masked_share": share, "adapters": adapter_weights(net), **_layers(net)}
    cost = flops(NetworkShape("mdlm", 16, 5, MASK + 1, LENGTH, LENGTH, **sizes))
    assert counted == pytest.approx(cost.step - 3 * cost.attention, rel=0.03)


# ---- weights that are not those of an adapter

BROKEN = {
    "lora_B beside it": lambda w, key: w.pop(f"{key}.lora_B"),
    "lora_A beside it": lambda w, key: w.pop(f"{key}.lora_A"),
    "rank 2 are": lambda w, key: w.update({f"{key}.lora_A": torch.zeros(3, 16)}),
    "lora_B and lora_A of rank 2": lambda w, key: w.pop(f"{key}.weight"),
    "torch.int64": lambda w, key: w.update({f"{key}.lora_A": torch.zeros(2, 16).long()}),
    "no row 6": lambda w, key: w.update({"model.embed_tokens.mask_row": torch.zeros(15)}),
    "mask_row is no row": lambda w, key: w.pop("model.embed_tokens.weight"),
}


@pytest.mark.parametrize("said", BROKEN)
def test_what_does_not_fit_is_refused(said):
    net, _ = adapted(small_llama)
    weights = copy.copy(dict(net.state_dict()))
    BROKEN[said](weights, "model.layers.0.self_attn.q_proj")
    with pytest.raises(ValueError, match="lora_B and lora_A of" if "lora_B b" in said else said):
        merged(weights, ADAPTER)
