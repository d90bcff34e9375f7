"""Part of gpu.py: are the numbers right?"""

import importlib.util
from collections.abc import Callable
from functools import cache, partial

import torch

from benchmarks.gpu_network import autocast, network
from models.attention import dense, get_backend
from models.masks import BlockCausal, BlockDiffusion, Causal


def check(args):
    found = {}
    for name, measured in checks(args).items():
        found[name] = entry = measured()
        print(f"{'ok   ' if entry['right'] else 'WRONG'} {name}: {entry['gap']:.1e}", flush=True)
        yield found


def checks(args) -> dict[str, Callable[[], dict]]:
    made, half, packed = {}, torch.bfloat16, BlockDiffusion(4)
    on_cpu = args.device.type == "cpu"  # where FlexAttention has no backward pass
    for backend in ("sdpa",) if on_cpu else ("sdpa", "flex"):
        for mask, both in ((BlockDiffusion(4), True), (BlockDiffusion(16), False)):
            made[f"{backend} {mask}"] = partial(attention_gap, backend, mask, both, args)
        made[f"{backend} {packed}, packed documents"] = partial(
            attention_gap, backend, packed, True, args, documents=5
        )
    if not on_cpu:
        made["flex bf16"] = partial(attention_gap, "flex", BlockDiffusion(16), True, args, half)
    if importlib.util.find_spec("flash_attn"):
        made["flash_attn bf16"] = partial(attention_gap, "flash_attn", Causal(), True, args, half)
    else:
        print("     flash_attn is not installed here")
    reference = cache(lambda: answers(args, torch.device("cpu")))
    made["network float32 against CPU"] = partial(network_gap, reference, args, None, 1e-4)
    made["network bf16 against CPU float32"] = partial(network_gap, reference, args, half, 0.1)
    made["cached against uncached"] = partial(cache_gap, args)
    made["a short last batch compiles nothing"] = partial(short_batch, args)
    return made


def verdict(gap: float, limit: float) -> dict:
    return {"gap": gap, "limit": limit, "right": gap <= limit}


def attention_gap(
    backend: str, mask, both: bool, args, dtype=torch.float32, documents: int = 1
) -> dict:
    """Largest difference of output and gradients in `dtype` to dense float32, of the scale."""
    keys = 2 * args.length
    queries = keys if both else args.length
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, n, 64) for n in (queries, keys, keys, queries)]
    made = [torch.randn(s, generator=generator).to(args.device) for s in shapes]
    results, document_ids = [], None
    if documents > 1:  # borders at another place in each row
        starts = torch.rand(2, args.length, generator=generator).argsort(-1) < documents - 1
        document_ids = starts.cumsum(-1).repeat(1, 2).to(args.device)
    made = [x.to(dtype).float() for x in made]
    for prepare, made_in in ((dense, torch.float32), (get_backend(backend), dtype)):
        qkv = [x.to(made_in, copy=True).requires_grad_() for x in made[:3]]
        out = prepare(mask, queries, keys, document_ids, args.device)(*qkv)
        out.backward(made[3].to(made_in))
        results.append([out.detach(), *(x.grad for x in qkv)])
    pairs = zip(*results, strict=True)
    gaps = [(a - b).abs().max() / a.abs().max() for a, b in pairs]
    gap = float(torch.stack(gaps).amax())  # nan where one of them is
    limits = {torch.bfloat16: 2e-2, torch.float32: 1e-3 if backend == "flex" else 1e-4}
    return verdict(gap, limits[dtype])


def network_gap(reference: Callable[[], torch.Tensor], args, dtype, limit: float) -> dict:
    wanted, ours = reference(), answers(args, args.device, dtype)
    return verdict(float((ours - wanted).abs().max() / wanted.abs().max()), limit)


@torch.no_grad()
def answers(args, device: torch.device, dtype=None) -> torch.Tensor:
    """The network's logits of one sequence, in float32 on the host."""
    net = network(args).eval().to(device)  # the weights are drawn on args.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(args.vocab - 1, (1, 2 * args.length), generator=generator).to(device)
    with autocast(device, dtype):
        return net.logits(net.hidden(tokens, attention_mask=BlockDiffusion(16))).float().cpu()


@torch.no_grad()
def cache_gap(args) -> dict:
    net = network(args).eval()
    tokens = torch.randint(args.vocab - 1, (3, 64), device=args.device)
    whole = net.hidden(tokens, attention_mask=BlockCausal(16))
    cache, parts = net.new_cache(3, 64, 16), []
    for start in range(0, 64, 16):
        block = tokens[:, start : start + 16]
        parts.append(net.hidden(block, attention_mask=cache.attention_mask, cache=cache))
        cache = cache.commit(16)
    gap = float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max())
    return verdict(gap, 1e-4)


def short_batch(args) -> dict:
    """Graphs made by a smaller batch after a larger one."""
    if args.device.type == "cpu":
        return verdict(0, 0)
    from torch._dynamo.utils import counters

    net = network(args, backend="flex")
    graphs = []
    for rows in (4, 3):
        tokens = torch.randint(args.vocab - 1, (rows, 2 * args.length), device=args.device)
        with autocast(args.device, torch.bfloat16):
            net.hidden(tokens, attention_mask=BlockDiffusion(16)).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    return verdict(graphs[1] - graphs[0], 0)
