"""Sampling speed: tokens/s of the batched sampler, as ratios of one run.

    python benchmarks/sampling.py             a table, and a line of JSON
    python benchmarks/sampling.py --check     exit 1 where a bound is missed

(a) time per evaluation after 2 048 and after 8 192 tokens, context 1 024: below 1.10
(b) batch 1, 8, 64: at least 0.7 of the tokens/s of a bare loop that does only the network's own
    work (blocks over batch x S rows, attention over the cached keys, head over one row per sample)
(c) batch 1: at least 8 times a plain loop that does what the published sampler does: recompute the
    visible window, float64 nucleus over the whole vocabulary at every position of the block, draw
    at all of them, use one, and one more pass per block

model=tiny with random weights, vocabulary 50 258, S = 16. (b) and (c) have a context of 256, which
is full when time is taken. The sampler draws with --nucleus (0.9); the bare loop draws nothing.
"""

import os
import platform
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.support.conclusion import conclude, options

SLOWDOWN, OF_BARE, OVER_PUBLISHED = 1.10, 0.7, 8.0
VOCABULARY, BLOCK, CONTEXT, LONG_CONTEXT = 50_258, 16, 256, 1024
TINY = {"hidden_size": 256, "cond_dim": 64, "n_blocks": 8, "n_heads": 8}
BATCHES = (1, 8, 64)


def main(argv=None) -> int:
    args = parse(argv)
    import torch

    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    denoise = network(args)
    with torch.inference_mode():
        figures = {
            "per_evaluation": lengths(denoise, args),
            "batches": [batch(denoise, b, args) for b in BATCHES],
            "published": published(denoise, args),
        }
    figures["scaling"] = figures["batches"][-1]["ours"] / figures["batches"][0]["ours"]
    figures["machine"] = f"{platform.machine()}, {args.threads} threads, {args.device}"
    figures["torch"] = torch.__version__
    figures["peak_memory_mib"] = peak_memory(args)
    show(figures)
    return conclude(figures, misses(figures), check=args.check)


def parse(argv):
    parser = options(__doc__, threads=len(os.sched_getaffinity(0)))
    parser.add_argument("--nucleus", type=float, default=0.9)
    parser.add_argument(
        "--blocks", type=int, default=2, help="blocks timed in each repetition; the fastest counts"
    )
    parser.add_argument("--repeat", type=int, default=3, help="repetitions; the fastest counts")
    return parser.parse_args(argv)


def network(args):
    import torch

    from models.dit import DiT
    from objectives.block_diffusion import MaskedDiffusion

    net = DiT(vocab_size=VOCABULARY, dropout=0.0, attn_backend="sdpa", **TINY)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    net = net.to(args.device).eval()
    objective = MaskedDiffusion(mask_id=VOCABULARY - 1, block_size=BLOCK, schedule=None)
    return objective.denoiser(net)


def synchronise(args) -> None:
    import torch

    if args.device != "cpu":
        torch.accelerator.synchronize()


def given(rows: int, tokens: int):
    """Requests whose text is `tokens` long already."""
    import torch

    from samplers.request import TextRequest

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY - 1, (rows, tokens), generator=generator).tolist()
    return [TextRequest(row, tuple(text)) for row, text in enumerate(ids)]


def timed(denoise, rows: int, start: int, context: int, args) -> float:
    """Seconds per evaluation of a batch, `start` tokens being there: of the fastest block but the
    first, so that a machine with other work counts as little as it can."""
    from samplers.params import SamplingParams
    from samplers.writing import generate

    params = SamplingParams(
        length=start + (1 + args.blocks) * BLOCK,
        bos_id=0,
        eos_id=0,
        batch_size=rows,
        block_size=BLOCK,
        context_size=context,
        kv_cache=True,
        nucleus_p=args.nucleus,
    )
    moments = []

    def tick(tokens, evaluations):
        synchronise(args)
        moments.append((time.perf_counter(), evaluations))

    groups = generate("bamdlm", denoise, given(rows, start), params, device=args.device, tick=tick)
    for _ in groups:
        pass
    return min((b - a) / n for (a, _), (b, n) in pairwise(moments))


def lengths(denoise, args) -> dict:
    """(a): taken in turns, so that a slow moment of the machine meets both."""
    pairs = [
        [timed(denoise, 1, tokens, LONG_CONTEXT, args) for tokens in (2048, 8192)]
        for _ in range(args.repeat)
    ]
    short, long = (min(times) for times in zip(*pairs, strict=True))
    return {"at_2048": short, "at_8192": long, "ratio": long / short}


def bare(denoise, rows: int, args) -> float:
    """Seconds per evaluation of the network alone, its cache full."""
    import torch

    net, cache = denoise.backbone, denoise.new_cache(rows, CONTEXT)
    tokens = torch.randint(VOCABULARY - 1, (rows, CONTEXT), device=args.device)
    net.hidden(tokens, attention_mask=cache.attention_mask, cache=cache)
    cache = cache.commit(CONTEXT)
    block = tokens[:, :BLOCK].contiguous()
    read = torch.arange(rows, device=args.device) * BLOCK
    moments = []
    for _ in range(2 + args.blocks):
        synchronise(args)
        moments.append(time.perf_counter())
        for _ in range(BLOCK):
            net.logits(
                net.hidden(block, attention_mask=cache.attention_mask, cache=cache, read=read)
            )
    return min(b - a for a, b in pairwise(moments)) / BLOCK


def batch(denoise, rows: int, args) -> dict:
    """(b), tokens/s: an evaluation makes one token of each row."""
    pairs = [
        (timed(denoise, rows, CONTEXT, CONTEXT, args), bare(denoise, rows, args))
        for _ in range(args.repeat)
    ]
    ours, alone = (rows / min(times) for times in zip(*pairs, strict=True))
    return {"batch": rows, "ours": ours, "bare": alone, "ratio": ours / alone}


def published_step(net, tokens, p, generator):
    """One first-hitting step as in the published sampler, written anew: everything at every
    position of the block in float64, one position used."""
    import torch

    from models.masks import BlockCausal

    hidden = net.hidden(tokens, attention_mask=BlockCausal(BLOCK))
    logits = net.logits(hidden)[:, -BLOCK:]
    logits[..., VOCABULARY - 1] = -torch.inf
    probs = logits.double().softmax(-1)
    ordered, order = probs.sort(dim=-1, descending=True)
    keep = ordered.cumsum(-1) <= p
    keep[..., 0] = True
    probs = torch.zeros_like(probs).scatter(-1, order, ordered * keep)
    probs = probs / probs.sum(-1, keepdim=True)
    noise = (
        1e-10 - (torch.rand(probs.shape, dtype=torch.float64, generator=generator) + 1e-10).log()
    )
    token = (probs / noise).argmax(-1)
    block = tokens[:, -BLOCK:]
    hidden = (block == VOCABULARY - 1).nonzero()
    chosen = hidden[int(torch.randint(0, len(hidden), (1,), generator=generator))]
    block[chosen[0], chosen[1]] = token[chosen[0], chosen[1]]
    return tokens


def plain(denoise, args) -> float:
    """Seconds per token of the published way, the window being full."""
    import torch

    from models.masks import BlockCausal

    net = denoise.backbone.to("cpu")
    generator = torch.Generator().manual_seed(2)
    past = torch.randint(VOCABULARY - 1, (1, CONTEXT - BLOCK))
    moments = [time.perf_counter()]
    for _ in range(args.blocks):
        tokens = torch.cat([past, torch.full((1, BLOCK), VOCABULARY - 1)], 1)
        for _ in range(BLOCK):
            tokens = published_step(net, tokens, args.nucleus, generator)
        net.hidden(tokens, attention_mask=BlockCausal(BLOCK))  # one more pass stores the block
        past = tokens[:, BLOCK:]
        moments.append(time.perf_counter())
    return min(b - a for a, b in pairwise(moments)) / BLOCK


def published(denoise, args) -> dict | None:
    """(c)"""
    if args.device != "cpu":
        return None
    pairs = [
        (timed(denoise, 1, CONTEXT, CONTEXT, args), plain(denoise, args))
        for _ in range(args.repeat)
    ]
    ours, theirs = (1 / min(times) for times in zip(*pairs, strict=True))
    return {"ours": ours, "published": theirs, "ratio": ours / theirs}


def peak_memory(args) -> float:
    import torch

    if args.device != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def misses(figures):
    ratio = figures["per_evaluation"]["ratio"]
    if ratio >= SLOWDOWN:
        yield f"(a) an evaluation takes {ratio:.2f} times as long at 8 192 as at 2 048 tokens"
    for row in figures["batches"]:
        if row["ratio"] < OF_BARE:
            yield f"(b) batch {row['batch']}: {row['ratio']:.2f} of the bare loop"
    if figures["published"] and figures["published"]["ratio"] < OVER_PUBLISHED:
        yield f"(c) {figures['published']['ratio']:.1f} times the published way"


def show(figures) -> None:
    a = figures["per_evaluation"]
    print(
        f"(a) ms per evaluation: {a['at_2048'] * 1e3:.2f} at 2 048 tokens,"
        f" {a['at_8192'] * 1e3:.2f} at 8 192: ratio {a['ratio']:.3f}"
    )
    for row in figures["batches"]:
        print(
            f"(b) batch {row['batch']:3}: {row['ours']:8.1f} tokens/s, bare loop"
            f" {row['bare']:8.1f}: ratio {row['ratio']:.3f}"
        )
    print(f"    batch 64 : 1 = {figures['scaling']:.2f}")
    c = figures["published"]
    if c:
        print(
            f"(c) {c['ours']:.1f} tokens/s, the published way {c['published']:.2f}:"
            f" {c['ratio']:.1f} times"
        )
    print(f"peak memory {figures['peak_memory_mib']:,.0f} MiB; {figures['machine']}")


if __name__ == "__main__":
    sys.exit(main())
