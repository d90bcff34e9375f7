"""Without gradients a CPU makes the MLP of a block some rows at a time."""

import pytest
import torch
from networks import LOGITS, assert_within, small, texts

from models import block
from models.masks import BlockDiffusion


@pytest.mark.parametrize("rows", [1, 5, 256])
@pytest.mark.parametrize("read", [None, [0, 3, 11, 17]], ids=["all", "some"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_parts_are_the_whole(rows, read, autocast, monkeypatch):
    monkeypatch.setattr(block, "CPU_ROWS", rows)
    net, tokens = small(), texts(2, 24, 7)
    read = None if read is None else torch.tensor(read, dtype=torch.int64)
    asked = {"attention_mask": BlockDiffusion(4), "read": read}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = net.hidden(tokens, **asked)
        with torch.no_grad():
            parts = net.hidden(tokens, **asked)
    assert whole.requires_grad
    assert parts.dtype == whole.dtype
    assert_within(parts, whole.detach(), LOGITS)


def test_no_row_may_be_read():
    none = torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        hidden = small().hidden(texts(2, 24, 7), attention_mask=BlockDiffusion(4), read=none)
    assert hidden.shape == (0, 16)


def test_the_inner_layer_is_never_held_whole(monkeypatch):
    monkeypatch.setattr(block, "CPU_ROWS", 5)
    net, held = small(), []
    for each in net.blocks:
        each.mlp[0].register_forward_hook(lambda _, __, inner: held.append(len(inner)))
    with torch.no_grad():
        net.hidden(texts(2, 24, 7), attention_mask=BlockDiffusion(4))
    assert max(held) == 5
    assert sum(held) == 2 * 24 + 2 * 12  # the last layer answers for the noised half
