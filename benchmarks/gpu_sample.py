"""Part of gpu.py: how fast is sampling?"""

import time
from itertools import islice

import torch

from benchmarks.gpu_network import autocast, await_turn, network, synchronise
from benchmarks.gpu_table import parallel_speed
from noise_schedule import get_schedule
from objectives.block_diffusion import MaskedDiffusion
from samplers.params import SamplingParams
from samplers.request import TextRequest
from samplers.writing import generate

PARALLEL = {"steps": "threshold", "threshold": 0.9}


def sample(args):
    found, denoise, many = {}, sampler(frozen(args), args), many_rows(args)
    for rows in (1, many, 8):
        warm_up(denoise, rows, args.length, args)
    await_turn(args.turn, args.device)
    for name, rows, texts in (("one", 1, 3), ("many", many, 1)):
        found[name] = entry = sampled(denoise, rows, args.length, texts, args)
        print(
            f"{rows} x {args.length} tokens: {entry['seconds'][-1]:.2f} s,"
            f" {entry['tokens_per_second']:,.0f} tokens/s",
            flush=True,
        )
        yield found
    # 2 048 tokens and 8 192: what a block costs once the window is full
    cost = [block_seconds(denoise, 8, start, args) for start in (2 * args.length, 8 * args.length)]
    found["block_seconds"], found["cost_ratio"] = cost, cost[1] / cost[0]
    print(
        f"a block of 8 texts behind {2 * args.length} and {8 * args.length} tokens:"
        f" {1000 * cost[0]:.2f} and {1000 * cost[1]:.2f} ms, {found['cost_ratio']:.3f} x",
        flush=True,
    )
    yield found


def parallel(args):
    """By a rule that may reveal several tokens at once. How many follows from how certain the
    network is: at least one, as random weights are never certain, and at most a block. In a process
    of its own, where nothing is compiled for other rules."""
    found, net, length = {}, frozen(args), args.length // 4
    denoise = sampler(net, args)
    for rows in (1, many_rows(args)):
        warm_up(denoise, rows, length, args, **PARALLEL)
    await_turn(args.turn, args.device)
    for kind in ("threshold", "threshold, certain"):
        if kind == "threshold, certain":
            make_certain(net)
        for rows, texts in ((1, 3), (many_rows(args), 1)):
            name = f"{rows} text{'' if rows == 1 else 's'}, {kind}"
            found[name] = entry = sampled(denoise, rows, length, texts, args, **PARALLEL)
            print(f"{name}: {parallel_speed(entry)}", flush=True)
            yield found


def many_rows(args) -> int:
    return 4 if args.tiny else 512


def make_certain(net) -> None:
    """Of one token, everywhere."""
    head = net.output_layer
    bias = head.linear.bias if head.wide_bias is None else head.wide_bias
    with torch.no_grad():
        bias[1] += 1000


def frozen(args):
    net = network(args, compiled=not args.tiny).eval()
    if not args.tiny:
        net.freeze(torch.bfloat16)
    return net


def sampler(net, args):
    objective = MaskedDiffusion(args.vocab - 1, 16, get_schedule("loglinear"))
    return objective.denoiser(net)


def warm_up(denoise, rows: int, length: int, args, blocks: int = 3, **rule) -> None:
    """Compile for `rows` texts of `length`, and write the first blocks of them."""
    # a run has one batch: that other ones came before is no sign that sizes change
    torch._dynamo.pgo.reset_code_state()
    for _ in islice(groups(denoise, rows, length, rows, args, **rule), blocks):
        pass


def sampled(denoise, rows: int, length: int, texts: int, args, **rule) -> dict:
    """`texts` batches of texts one after the other; tokens/s of the last one."""
    seconds, evaluations = [], 0
    synchronise(args.device)
    started = time.perf_counter()
    for group in groups(denoise, rows, length, rows * texts, args, **rule):
        if group:
            synchronise(args.device)
            seconds.append(time.perf_counter() - started)
            evaluations += sum(text.nfe for text in group)
            started = time.perf_counter()
    return {
        "seconds": seconds,
        "tokens_per_second": rows * length / seconds[-1],
        "tokens_per_evaluation": (length - 1) * rows * texts / evaluations,
    }


def block_seconds(denoise, rows: int, start: int, args, warm_up: int = 4, blocks: int = 8) -> float:
    """Of one more block behind `start` tokens."""
    made = groups(denoise, rows, start + 16 * (warm_up + blocks + 1), rows, args, given=start)
    for _ in range(warm_up):
        next(made)
    synchronise(args.device)
    started = time.perf_counter()
    for _ in range(blocks):
        next(made)
    synchronise(args.device)
    return (time.perf_counter() - started) / blocks


def groups(denoise, rows: int, length: int, texts: int, args, given: int = 1, **rule):
    """Rounds of one block; `given`: tokens that are there already; `rule`: which are revealed."""
    params = SamplingParams(
        length=length,
        bos_id=0,
        eos_id=0,
        batch_size=rows,
        block_size=16,
        context_size=args.length,
        kv_cache=True,
        nucleus_p=0.9,
        **rule,
    )
    requests = [TextRequest(row, (0,) * given) for row in range(texts)]
    with autocast(args.device, None if args.tiny else torch.bfloat16):
        yield from generate("bamdlm", denoise, requests, params, device=args.device)
