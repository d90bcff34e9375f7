"""Losses without gradients on a CPU, made from two sums of each row of logits, are those that a
training step makes from the logits themselves."""

from types import SimpleNamespace

import pytest
import test_adapting
import test_chat_losses
import torch
import torch.nn.functional as F
from networks import small, small_llama, texts

from noise_schedule import LogLinear
from objectives import head
from objectives.head import cross_entropy_kernel, head_loss, row_sums
from objectives.sedd import ScoreEntropy

ROWS, WIDTH, WORDS = 11, 5, 13
TILES = [(1, 1), (4, 3), (3, 64), (1024, 1024)]  # rows, columns


def numbers(dtype=torch.float64, scale=1.0):
    """features [M, E], weight [V, E], bias [V], targets [M]."""
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, WIDTH), (WORDS, WIDTH), (WORDS,)
    made = [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return *(x.to(dtype) for x in made), torch.arange(ROWS) % WORDS


def small_tiles(monkeypatch, rows, columns):
    monkeypatch.setattr(head, "TILE_ROWS", rows)
    monkeypatch.setattr(head, "CPU_COLUMNS", columns)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("mask_id", [0, 5, WORDS - 1])
@pytest.mark.parametrize("biased", [True, False])
def test_the_sums_are_those_of_the_whole_row(tile, mask_id, biased, monkeypatch):
    """Also where the mask is a tile of its own, or rows or columns are left over."""
    small_tiles(monkeypatch, *tile)
    x, weight, bias, targets = numbers()
    sums = row_sums(x, weight, bias if biased else None, targets, mask_id)
    logits = x @ weight.T + (bias if biased else 0)
    logits[:, mask_id] = -torch.inf
    torch.testing.assert_close(sums.norm, logits.logsumexp(-1))
    torch.testing.assert_close(sums.picked, logits.gather(1, targets[:, None])[:, 0])
    assert (sums.picked == -torch.inf).sum() == (targets == mask_id).sum()


@pytest.mark.parametrize("target", [-1, -100, WORDS])
def test_a_target_that_is_no_token_has_no_loss(target):
    x, weight, bias, targets = numbers()
    targets[3] = target
    sums = row_sums(x, weight, bias, targets, 5)
    assert sums.picked.isnan().nonzero().flatten().tolist() == [3]


def test_large_logits_do_not_overflow(monkeypatch):
    small_tiles(monkeypatch, 4, 3)
    x, weight, bias, targets = numbers(torch.float32, scale=40.0)
    logits = x.double() @ weight.double().T + bias.double()
    assert logits.amax() > 1000
    logits[:, 5] = -torch.inf
    close(row_sums(x, weight, bias, targets, 5).norm.double(), logits.logsumexp(-1))


def test_logits_are_never_held_whole(monkeypatch):
    small_tiles(monkeypatch, 4, 3)
    held, made = [], head.products

    def noted(*operands, out):
        held.append(tuple(out.shape))
        made(*operands, out=out)

    monkeypatch.setattr(head, "products", noted)
    row_sums(*numbers(), 5)
    assert sum(rows * columns for rows, columns in held) == ROWS * WORDS
    assert max(held) == (4, 3)


def kernel(name, net):
    if name == "score entropy":
        return ScoreEntropy(net.vocab_size - 1, LogLinear()).kernel(net), 1
    return cross_entropy_kernel(net, net.vocab_size - 1), 0


@pytest.mark.parametrize("name", ["cross-entropy", "score entropy"])
@pytest.mark.parametrize("make", [small, small_llama])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_without_gradients_is_the_one_with_them(name, make, autocast, monkeypatch):
    small_tiles(monkeypatch, 16, 3)
    net, targets, factors = make(), texts(1, 50, 6)[0], torch.linspace(0, 1, 50)
    hidden = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
    made, extras = kernel(name, net)
    rows = (torch.linspace(0.05, 30, 50),)[:extras]
    found = []
    for gradients in (True, False):
        with (
            torch.set_grad_enabled(gradients),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            found.append(head_loss(net, hidden, targets, factors, made, *rows))
    slow, fast = found
    assert fast.losses.dtype == slow.losses.dtype == torch.float32
    assert slow.total.requires_grad
    assert not fast.total.requires_grad
    close(fast.losses, slow.losses)
    close(fast.total, slow.total.detach())


def test_where_nothing_is_masked_the_loss_is_0():
    net = small()
    with torch.no_grad():
        none = torch.zeros(0, dtype=torch.int64)
        loss = head_loss(net, torch.zeros(0, 16), none, torch.zeros(0), kernel("", net)[0])
    assert loss.losses.shape == (0,)
    assert loss.total == 0


def test_without_gradients_a_cpu_makes_no_loss_of_whole_rows(monkeypatch):
    """Nor compiles one, where the network is compiled."""

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(head, "fused_cross_entropy", never)
    monkeypatch.setattr(head, "_ChunkedHead", never)
    x, weight, bias, targets = numbers()
    network = SimpleNamespace(
        features=lambda hidden, *_: hidden, head_weight=weight, head_bias=bias, compiled=True
    )
    targets, logits = targets % (WORDS - 1), (x @ weight.T + bias)[:, :-1]
    with torch.inference_mode():
        made = cross_entropy_kernel(network, WORDS - 1)
        loss = head_loss(network, x, targets, torch.ones(ROWS), made)
    close(loss.losses.double(), F.cross_entropy(logits, targets, reduction="none"))


def both_ways(objective, net, inputs):
    """TokenLoss with gradients and without."""
    slow = objective.compute_loss(net, inputs)
    with torch.no_grad():
        fast = objective.compute_loss(net, inputs)
    assert slow.nll.any()
    for name in ("nll", "per_place", "mean"):
        close(getattr(fast, name), getattr(slow, name).detach())
    assert not fast.per_place.requires_grad
    return slow, fast


@pytest.mark.parametrize(("name", "kind"), test_chat_losses.CASES)
@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_of_every_algorithm_lose_nothing(name, kind, training, monkeypatch):
    small_tiles(monkeypatch, 16, 3)
    inputs = test_chat_losses.inputs(name, texts(2, 24, 6), kind, training)
    both_ways(test_chat_losses.OBJECTIVES[name], test_chat_losses.network(name), inputs)


@test_adapting.each_network
@test_adapting.each_adaptation
@pytest.mark.parametrize("kind", ["times", "counts", "views", "sizes"])
@pytest.mark.parametrize("ar_loss", [0.0, 0.3])
def test_adapted_networks_lose_nothing(make, adapt, kind, ar_loss, monkeypatch):
    small_tiles(monkeypatch, 16, 3)
    inputs, objective, _ = test_adapting.batch(kind, adapt, ar_loss=ar_loss)
    slow, fast = both_ways(objective, make(), inputs)
    assert (slow.ar is None) == (ar_loss == 0)
    if ar_loss:
        close(fast.ar, slow.ar)
