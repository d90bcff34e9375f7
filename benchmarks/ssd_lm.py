"""SSD-LM, tokens/s: 8 samples together against 8 one after another as published.

    python benchmarks/ssd_lm.py             a table, and a line of JSON
    python benchmarks/ssd_lm.py --check     exit 1 unless 1.5 times as fast with the same numbers

As published: one sample at a time, logits of context and block, a sort of the whole vocabulary for
the top-p projection, one-hot tensors. It is given the same random numbers and no_grad here (the
reference decodes with gradients on: --gradients), so the gain is not in those. The same numbers:
the last block's logits within 1e-4 of their scale, and the same tokens. Runs are short and take
turns; the fastest of each kind counts, so that a busy machine disturbs little.

The model has RoBERTa's vocabulary and random weights; --width and --layers size it.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "ssd-lm"), str(ROOT)]

FASTER = 1.5
SAME = 1e-4


def main(argv=None) -> int:
    args = parse(argv)
    import torch

    torch.manual_seed(0)
    device = torch.device(args.device)
    model = random_model(args, device)
    torch.set_num_threads(args.threads)
    together(args, model, rows=args.samples)  # warm-up: pages, kernels
    runs = {"one by one, as published": [], "together": [], "one by one, here": []}
    for _ in range(args.repeats):
        runs["one by one, as published"].append(timed(published, args, model))
        runs["together"].append(timed(together, args, model, rows=args.samples))
        runs["one by one, here"].append(timed(together, args, model, rows=1))
    if args.gradients:
        runs["as published, gradients on"] = [timed(published, args, model, grad=True)]
    return report(args, runs)


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--blocks", type=int, default=1)
    p.add_argument("--total_t", type=int, default=3)
    p.add_argument("--width", type=int, default=128)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--vocabulary", type=int, default=50265)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument(
        "--threads", type=int, default=1, help="two that share a core wait for each other"
    )
    p.add_argument("--device", default="cpu")
    p.add_argument("--gradients", action="store_true", help="a row with gradients on, as published")
    p.add_argument("--check", action="store_true", help="exit 1 if slower or different")
    args = p.parse_args(argv)
    for name in (
        "samples",
        "blocks",
        "total_t",
        "width",
        "layers",
        "vocabulary",
        "repeats",
        "threads",
    ):
        if getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def random_model(args, device):
    import torch
    from ssd_model import SSDLM
    from ssd_tiny import randomise
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64),
        intermediate_size=4 * args.width,
        max_position_embeddings=514,
        pad_token_id=1,
    )
    roberta = RobertaForMaskedLM(config).to(device).eval()
    randomise(roberta, torch.Generator(device).manual_seed(0))
    embed_sum = roberta.get_input_embeddings().weight.detach().T.contiguous()
    weight, bias = torch.randn(2, args.width, device=device) * 0.1
    return SSDLM(roberta, embed_sum, weight, bias)


BLOCK, TOP_P, K, BOS = 25, 0.95, 5.0, 0


def together(args, model, rows):
    """This project's decoding, `rows` samples at a time: [(tokens, last logits)] per sample."""
    from ssd_decode import RowNoise, decode_block

    found = []
    for first in range(0, args.samples, rows):
        indices = list(range(first, min(first + rows, args.samples)))
        context, tokens = [[BOS]] * len(indices), []
        for block in range(args.blocks):
            noise = RowNoise(1, indices, block, (BLOCK, model.vocab_size), model.device)
            logits = no_grad(
                decode_block,
                model,
                model.context(context),
                noise,
                total_t=args.total_t,
                top_p=TOP_P,
                one_hot_value=K,
                on_step=lambda: None,
            )
            context = logits.argmax(-1)
            tokens.append(context)
        for i in range(len(indices)):
            found.append(([t[i].tolist() for t in tokens], logits[i].clone()))
    return found


def no_grad(function, *args, **kwargs):
    import torch

    with torch.no_grad():
        return function(*args, **kwargs)


def published(args, model, grad=False):
    """The reference's loop for one sample after the other, written from spec §8."""
    import torch

    with torch.set_grad_enabled(grad):
        return [published_sample(args, model, index) for index in range(args.samples)]


def published_sample(args, model, index):
    import torch
    from ssd_decode import RowNoise

    context, tokens = torch.tensor([[BOS]], device=model.device), []
    for block in range(args.blocks):
        noise = RowNoise(1, [index], block, (BLOCK, model.vocab_size), model.device)
        embedded = model.roberta.get_input_embeddings()(context)
        x = K * noise.gaussian()
        for t in range(args.total_t, 0, -1):
            z = noise.gaussian()
            soft = torch.softmax(x, -1) @ model.embed_sum.T
            step = (model.time_weight * (t / args.total_t) + model.time_bias).expand_as(soft)
            inputs = torch.cat([embedded, soft + step], 1)
            logits = model.roberta(inputs_embeds=inputs).logits[:, -BLOCK:]
            one_hot = published_projection(logits, noise)
            signal = cosine(t - 1, args.total_t)
            x = math.sqrt(signal) * one_hot + math.sqrt(1 - signal) * K * z
        context = logits.argmax(-1)
        tokens.append(context[0].tolist())
    return tokens, logits[0].detach()


def published_projection(logits, noise):
    """Sort, cumulate, cut, draw, one-hot; the draw is the batched run's, so that texts agree."""
    import torch
    import torch.nn.functional as F

    ordered, order = torch.sort(logits, descending=True)
    cumulated = torch.softmax(ordered, -1).cumsum(-1)
    beyond = cumulated > TOP_P
    beyond[..., 1:] = beyond[..., :-1].clone()
    beyond[..., 0] = False
    cut = beyond.scatter(2, order, beyond)
    filtered = logits.masked_fill(cut, -1e10)
    torch.softmax(filtered, -1)  # what its Categorical computes ahead of the draw
    drawn = noise.choose(logits.detach(), TOP_P)
    assert not cut.gather(2, drawn.unsqueeze(2)).any()
    return F.one_hot(drawn, logits.shape[-1]) * (2 * K) - K


def cosine(t, total_t, s=1e-4):
    return (
        math.cos((t / total_t + s) / (1 + s) * math.pi / 2) ** 2
        / math.cos(s / (1 + s) * math.pi / 2) ** 2
    )


def timed(function, args, model, **options):
    import torch

    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    started = time.perf_counter()
    found = function(args, model, **options)
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started, found


def report(args, runs) -> int:
    import torch

    tokens = args.samples * args.blocks * BLOCK
    seconds = {name: min(run[0] for run in of) for name, of in runs.items()}
    reference = runs["one by one, as published"][0][1]
    batched = runs["together"][0][1]
    difference = max(
        ((a[1] - b[1]).abs().max() / b[1].abs().max()).item()
        for a, b in zip(batched, reference, strict=True)
    )
    same_tokens = [a[0] for a in batched] == [b[0] for b in reference]
    gain = seconds["one by one, as published"] / seconds["together"]
    for name, taken in seconds.items():
        faster = seconds["one by one, as published"] / taken
        print(f"{name:28} {taken:8.2f} s {tokens / taken:9.1f} tokens/s {faster:6.2f} x")
    print(
        f"largest difference of logits {difference:.1e} of their scale; same tokens: {same_tokens}"
    )
    met = gain >= FASTER and difference <= SAME and same_tokens
    result = {
        "benchmark": "ssd_lm",
        "samples": args.samples,
        "speedup": round(gain, 3),
        "required": FASTER,
        "tokens_per_second": {n: round(tokens / s, 2) for n, s in seconds.items()},
        "difference": difference,
        "same_tokens": same_tokens,
        "met": met,
        "settings": {k: v for k, v in vars(args).items() if k != "check"},
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(result))
    return 1 if args.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
