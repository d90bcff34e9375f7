"""Our loss and the published one (plain_step.py), of one network on the same ids.

B batch   L tokens   R batches of ids, which take turns
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.support import plain_step
from models.dit import DiT
from noise_schedule import get_schedule
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import Noise, draw_example_noise
from objectives.sedd import ScoreEntropy
from objectives.sizes import SizeLaw

INTERVAL = (1e-3, 1.0)
FIXED = 3  # corruptions that the plain step is given, at least


@dataclass(frozen=True)
class Pair:
    """Functions of a step's number that give the mean loss in nats, a scalar tensor."""

    net: DiT
    ours: Callable[[int], Tensor]  # draws its noise
    ours_given: Callable[[int], Tensor]  # of the corruption that `plain` is given
    plain: Callable[[int], Tensor]


def network(algo: str, args) -> DiT:
    """Random weights, no dropout. Parameters that start at zero are moved: they would hide
    everything behind them."""
    torch.manual_seed(0)
    net = DiT(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        cond_dim=128,
        n_blocks=args.blocks,
        n_heads=args.heads,
        dropout=0.0,
        adaln=algo != "ar",
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("output_layer") or "adaLN" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    return net.to(args.device)


def objective_of(algo: str, mask_id: int, block_size: int):
    if algo == "ar":
        return Autoregressive(mask_id)
    schedule = get_schedule("loglinear")
    if algo == "sedd":
        return ScoreEntropy(mask_id, schedule)
    return MaskedDiffusion(mask_id, block_size, schedule)


def noise_of(
    step: int, batch: int, length: int, block_size: int, device=None, sizes: SizeLaw | None = None
) -> Noise:
    return draw_example_noise(
        1,
        torch.arange(batch, device=device) + step * batch,
        global_batch=batch,
        length=length,
        block_size=block_size,
        antithetic=True,
        sizes=sizes,
    )


def make_pair(algo: str, net: DiT, heads: int, ids: Tensor, size: int, *, training: bool) -> Pair:
    """ids: int64 [R, B, L], below the mask's id, which is the last. size: tokens of a block, for
    bamdlm."""
    mask_id = net.vocab_embed.embedding.shape[0] - 1
    valid, weights = torch.ones_like(ids[0]), dict(net.named_parameters())
    count, batch, length = ids.shape
    block_size = size if algo == "bamdlm" else length
    objective = objective_of(algo, mask_id, block_size)
    if algo == "ar":
        return _next_token_pair(net, heads, ids, objective, training)

    def noise(i: int) -> Noise:
        return noise_of(i, batch, length, block_size, ids.device)

    loss_mask = objective.loss_mask(valid, training).float()
    given = [
        objective.corrupt(ids[i % count], noise(i), INTERVAL) for i in range(max(FIXED, count))
    ]
    published, extra, interval = plain_step.score_entropy_loss, {}, {}
    if algo != "sedd":
        published, interval = plain_step.masked_loss, {"interval": INTERVAL}
        extra = {"block_size": block_size, "mask": None}
        if algo == "bamdlm":
            extra["mask"] = plain_step.block_diffusion_mask(length, block_size, ids.device)

    def ours(i: int) -> Tensor:
        x0 = ids[i % count]
        return objective.loss(net, x0, valid, noise(i), interval=INTERVAL, training=training).mean

    def ours_given(i: int) -> Tensor:
        corrupted = given[i % len(given)]
        inputs = objective.loss_inputs_at(ids[i % count], *corrupted, loss_mask, **interval)
        return objective.compute_loss(net, inputs).mean

    def plain(i: int) -> Tensor:
        corrupted = given[i % len(given)]
        return published(
            weights, heads, ids[i % count], *corrupted, loss_mask, mask_id=mask_id, **extra
        )

    return Pair(net, ours, ours_given, plain)


def _next_token_pair(net: DiT, heads: int, ids: Tensor, objective: Autoregressive, training: bool):
    valid, weights = torch.ones_like(ids[0]), dict(net.named_parameters())

    def ours(i: int) -> Tensor:
        return objective.loss(net, ids[i % len(ids)], valid, training=training).mean

    def plain(i: int) -> Tensor:
        return plain_step.next_token_loss(
            weights, heads, ids[i % len(ids)], valid.float(), mask_id=objective.mask_id
        )

    return Pair(net, ours, ours, plain)
