"""DiT.freeze: what evaluation keeps is what every pass makes anew."""

import copy

import pytest
import torch
from networks import assert_within, small, texts

from models.masks import BlockCausal, Causal, Full


def logits(net, tokens, sigma, mask):
    with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16):
        hidden = net.hidden(tokens, sigma, attention_mask=mask)
        row = torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens.shape[1])
        return net.logits(hidden.flatten(0, 1), sigma, row)


@pytest.mark.parametrize("sigma", [None, torch.tensor([0.3, 2.0])], ids=["zero", "given"])
@pytest.mark.parametrize(
    ("mask", "adaln"), [(Full(), True), (BlockCausal(4), True), (Causal(), False)], ids=repr
)
def test_a_frozen_network_gives_the_logits_of_autocast(mask, adaln, sigma):
    net, tokens = small(adaln=adaln), texts(2, 24, 7)
    frozen = copy.deepcopy(net)
    frozen.freeze(torch.bfloat16)
    ours, plain = logits(frozen, tokens, sigma, mask), logits(net, tokens, sigma, mask)
    assert ours.shape == plain.shape
    assert ours.dtype == plain.dtype == torch.bfloat16
    # a wider product may sum in another order: one rounding of bf16
    assert_within(ours.float(), plain.float(), 2**-8)


@pytest.mark.gpu
def test_a_frozen_network_on_a_gpu_gives_the_logits_of_autocast(cuda):
    """Where the GELU is made inside the product before it, of sums in float32: as close to float32
    as without."""
    net, tokens = small(hidden_size=64).to(cuda), texts(2, 24, 7).to(cuda)
    with torch.no_grad():
        exact = net.logits(net.hidden(tokens, attention_mask=Full())).flatten(0, 1)
    plain = logits(net, tokens, None, Full()).float()
    net.freeze(torch.bfloat16)
    ours = logits(net, tokens, None, Full()).float()
    assert_within(ours, plain, 2**-5)
    assert (ours - exact).square().mean() < 1.2 * (plain - exact).square().mean()


def test_freezing_adds_nothing_to_a_checkpoint():
    net = small()
    names = list(net.state_dict())
    net.freeze(torch.bfloat16)
    assert list(net.state_dict()) == names


def test_the_frozen_modulation_is_the_one_of_sigma_zero():
    net = small()
    tokens = texts(2, 24, 7)
    plain = net.hidden(tokens, attention_mask=Full())
    net.freeze(torch.float32)
    assert torch.equal(net.hidden(tokens, attention_mask=Full()), plain)
    moved = net.hidden(tokens, torch.tensor([1.0, 2.0]), attention_mask=Full())
    assert not torch.allclose(moved, plain)
