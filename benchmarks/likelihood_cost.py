"""What `exact` and `left_to_right` cost beside their matrix products, and the time of a corpus.

The products of a likelihood are those of its passes over the noised half, one over the clean half,
and its rows of the head; S = 4. Bare matrix products of these shapes are timed in turns with it.
"""

import statistics
import time
from contextlib import nullcontext

import torch
from torch import Tensor

from evaluation import estimators
from evaluation.estimators import AskedTexts, Chance
from evaluation.network import asker, rows_at_once
from models.dit import DiT

BLOCK = 4
# (passes over the noised half, rows of the head per token)
WORK = {"exact": (15, 8), "left_to_right": (4, 1)}
OVER_PRODUCTS = 1.35  # at most
CORPUS_ROWS, CORPUS_LENGTH, CORPUS_SECONDS = 384, 1024, 60  # AG News; on an H100
SMALL = {"hidden_size": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12, "vocab_size": 50_258}


def estimate(net: DiT, x0: Tensor, name: str) -> Tensor:
    """Nats per token, [B, L]; position 0 is not scored."""
    scored = torch.ones_like(x0, dtype=torch.bool)
    scored[:, 0] = False
    mask_id = net.vocab_size - 1
    ask = asker(net, x0, block_size=BLOCK, mask_id=mask_id)
    chance = Chance(1, torch.arange(len(x0)), len(x0))
    return getattr(estimators, name)(ask, AskedTexts(x0, scored, BLOCK, mask_id), chance)


def products(net: DiT, rows: int, passes: int, head_rows: int):
    """A function that makes the products alone: `passes` + 1 over `rows` rows, and of the head
    `head_rows` rows per row."""
    linears = [(block.attn_qkv, block.attn_out, block.mlp[0], block.mlp[2]) for block in net.blocks]
    weight = net.output_layer.linear.weight
    states = {
        w: torch.randn(rows, w, device=weight.device, dtype=weight.dtype) for w in widths(net)
    }
    size = min(rows_at_once(net), rows * head_rows)
    head = torch.randn(size, weight.shape[1], device=weight.device, dtype=weight.dtype)

    def make() -> None:
        for _ in range(passes + 1):
            for layer in linears:
                for linear in layer:
                    linear(states[linear.in_features])
        left = rows * head_rows
        while left > 0:
            net.output_layer.linear(head[:left])
            left -= size

    return make


def widths(net: DiT) -> set[int]:
    return {linear.in_features for linear in (net.blocks[0].attn_qkv, net.blocks[0].mlp[2])}


def random_network(device: str) -> DiT:
    """model=small, every weight a random number."""
    torch.manual_seed(0)
    net = DiT(**SMALL, dropout=0.0, attn_backend="sdpa" if device == "cpu" else "flex")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.02)
    return net.to(device).eval()


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def costs(args, clock) -> dict:
    """{likelihood: its time / that of its products, and of one nelbo pass}, model=small."""
    net = random_network(args.device)
    x0 = torch.randint(SMALL["vocab_size"] - 1, (1, args.length), device=args.device)
    found = {}

    def timed(work) -> float:
        synchronise(args.device)
        started = clock()
        work()
        synchronise(args.device)
        return clock() - started

    for name, (passes, head_rows) in WORK.items():
        bare = products(net, x0.numel(), passes, head_rows)
        ways = (
            lambda name=name: estimate(net, x0, name),
            bare,
            lambda: estimate(net, x0, "nelbo"),
        )
        rounds = [[timed(way) for way in ways] for _ in range(args.rounds + 1)][1:]
        found[name] = {
            "over_products": statistics.median(r[0] / r[1] for r in rounds),
            "nelbo_passes": statistics.median(r[0] / r[2] for r in rounds),
        }
    return found


def misses(found: dict):
    for name, figures in found.items():
        if figures["over_products"] > OVER_PRODUCTS:
            yield f"{name}: {figures['over_products']:.2f} x its products, wanted {OVER_PRODUCTS}"


def corpus(device: str, batch: int) -> dict:
    """Seconds for a corpus of AG News' size by `exact` and `left_to_right`, model=small with random
    weights; in bf16 but on a CPU. The first batch is not counted: it compiles."""
    net, on_cpu = random_network(device), device == "cpu"
    if not on_cpu:
        net.freeze(torch.bfloat16)
    autocast = nullcontext() if on_cpu else torch.autocast(device, torch.bfloat16)
    ids = torch.randint(SMALL["vocab_size"] - 1, (CORPUS_ROWS, CORPUS_LENGTH), device=device)
    found = {}
    with torch.inference_mode(), autocast:
        for name in WORK:
            float(estimate(net, ids[:batch], name).sum())
            started = time.perf_counter()
            total = sum(float(estimate(net, part, name).sum()) for part in ids.split(batch))
            found[name] = {
                "seconds": time.perf_counter() - started,
                "nll": total / (CORPUS_ROWS * (CORPUS_LENGTH - 1)),
            }
    return found
