"""Preparing and loading data: speed against the tokenizer alone and the training step; memory.

    python benchmarks/data.py             a table, and a line of JSON
    python benchmarks/data.py --check     exit 1 where a bound is missed

(a) preparation: tokens/s, at least 0.7 of what `tokenizers` alone does on as many cores with the
    same text, which it has in memory (encode_batch_fast, the faster of its calls)
(b) loaders: tokens/s, at least 20 times what a training step takes (model=tiny, forward and
    backward pass, on this machine); of prepared rows, and of streamed text after its first batch
(c) resident memory of preparing 10 MB and 500 MB of text: it grows by less than 100 MB, in this
    process and in a worker

The text is the embedded plays, as often as needed, as JSON lines; tokenizer gpt2. Each figure comes
from a process of its own. In (a) the two take turns: rates are the best of --rounds, the ratio is
the median over the rounds.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OF_TOKENIZERS, OVER_STEP, GROWTH = 0.7, 20.0, 100.0
CORES = len(os.sched_getaffinity(0))
LENGTH = 1024


def main(argv=None) -> int:
    args = parse(argv)
    if args.measure:
        kind, *rest = args.measure.split(",")
        print(json.dumps(MEASURES[kind](*rest)))
        return 0
    from benchmarks.support.conclusion import conclude

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measured(args, Path(folder))
    figures["machine"] = f"{platform.machine()}, {CORES} cores"
    return conclude(figures, misses(figures), check=args.check)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--megabytes", type=int, default=30, help="of text in (a)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time over all processes, for machines with other work on them",
    )
    parser.add_argument("--memory", default="10,500", help="megabytes of text in (c)")
    parser.add_argument("--folder", help="for the text and the prepared rows; default: temporary")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a process of its own measures
    return parser.parse_args(argv)


def measured(args, folder: Path) -> dict:
    text = write_text(folder, args.megabytes)
    figures = {"clock": args.clock, "preparation": []}
    for cores in sorted({1, CORES}):
        pairs = []
        for _ in range(args.rounds):
            theirs = ask("alone", text, cores, args.clock)
            pairs.append((theirs, ask("prepared", text, cores, args.clock, folder)))
        theirs, ours = (max(rates) for rates in zip(*pairs, strict=True))
        ratio = statistics.median(ours / theirs for theirs, ours in pairs)
        row = {"cores": cores, "tokenizers": theirs, "ours": ours, "ratio": ratio}
        figures["preparation"].append(row)
        print(
            f"(a) {cores} cores: {row['ours']:12,.0f} tokens/s per core prepared, tokenizers alone"
            f" {row['tokenizers']:12,.0f}: ratio {row['ratio']:.3f}"
        )
    figures["reading"] = ask("reading", text)
    print(f"    reading alone (passing over finished parts): {figures['reading']:.0f} MB/s")
    figures["loader"] = ask("loader", text, folder)
    loader = figures["loader"]
    for name in ("prepared", "streamed"):
        loader[f"{name}_ratio"] = loader[name] / loader["step"]
        print(
            f"(b) {name}: {loader[name]:12,.0f} tokens/s, a step takes {loader['step']:10,.0f}:"
            f" {loader[f'{name}_ratio']:,.0f} times"
        )
    print(f"    first streamed batch after {loader['first_batch']:.1f} s")
    figures["memory"] = []
    for megabytes in map(int, args.memory.split(",")):
        row = ask("memory", write_text(folder, megabytes), folder)
        figures["memory"].append({"megabytes": megabytes} | row)
        print(f"(c) {megabytes} MB of text: {row['here']:.0f} here, {row['worker']:.0f} a worker")
    return figures


def write_text(folder: Path, megabytes: int) -> Path:
    from data.packaged import shakespeare

    path = folder / f"{megabytes}.jsonl"
    scenes = [json.dumps({"text": scene}) + "\n" for scene in shakespeare.documents("train")]
    size = 0
    with path.open("w", encoding="ascii") as file:
        for line in itertools.cycle(scenes):
            size += file.write(line)
            if size >= megabytes * 1_000_000:
                return path


def ask(*what):
    """What a process of its own measures."""
    command = [sys.executable, __file__, "--measure", ",".join(map(str, what))]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def seconds(clock: str) -> float:
    if clock == "wall":
        return time.perf_counter()
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def per_core(clock: str, cores: int, tokens: int, began: float) -> float:
    """tokens/s of a core; processor time counts all cores already."""
    return tokens / (seconds(clock) - began) / (cores if clock == "wall" else 1)


def gpt2():
    from data.tokenizer import get_tokenizer

    return get_tokenizer("gpt2")


def alone(path: str, cores: str, clock: str) -> float:
    """`tokenizers` with its own threads."""
    if int(cores) > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = cores
    backend = gpt2().hf.backend_tokenizer
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    began, tokens = seconds(clock), 0
    for i in range(0, len(texts), 200):
        batch = backend.encode_batch_fast(texts[i : i + 200], add_special_tokens=False)
        tokens += sum(map(len, batch))
    return per_core(clock, int(cores), tokens, began)


def split_of(path: str):
    from data.split import Split

    made = Split(path, "train", tokenizer=gpt2(), length=LENGTH)
    _ = made.about  # the fingerprint of the tokenizer takes a third of a second, once
    return made


def prepare(split, cache: str, processes: int):
    from data import preparation
    from data.remote_cache import CacheDir

    return preparation.prepare(split, CacheDir(Path(cache)), processes)


def prepared(path: str, cores: str, clock: str, folder: str) -> float:
    text = split_of(path)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began = seconds(clock)
        made = prepare(text, cache, int(cores))
        return per_core(clock, int(cores), made.about["tokens"], began)


def reading(path: str) -> float:
    """MB/s"""
    text = split_of(path)
    began = time.perf_counter()
    for _ in text.open(Path(path).parent)[1]:
        pass
    return Path(path).stat().st_size / 1e6 / (time.perf_counter() - began)


def loader(path: str, folder: str) -> dict:
    """tokens/s of the loaders of prepared rows and of streamed text, and of a training step."""
    import torch

    from data.streaming import streamed

    torch.set_num_threads(CORES)
    text = split_of(path)
    found = {}
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        rows = prepare(text, cache, CORES)
        found["prepared"], _ = loaded(rows, 2000)
        found["streamed"], found["first_batch"] = loaded(streamed(text, Path(cache)), 200)
    found["step"] = step()
    return found


def loaded(train, batches: int, batch: int = 16) -> tuple[float, float]:
    """(tokens/s after the first batch, seconds until then); one worker, as training has it."""
    from dataloader import DataModule

    data = DataModule(
        train=train,
        valid=None,
        length=LENGTH,
        batch_size=batch,
        eval_batch_size=batch,
        num_workers=1,
    )
    began = time.perf_counter()
    iterator = iter(data.train_dataloader())
    next(iterator)
    first = time.perf_counter()
    for _ in itertools.islice(iterator, batches):
        pass
    return batches * batch * LENGTH / (time.perf_counter() - first), first - began


def step(length: int = 256, batch: int = 4) -> float:
    """tokens/s of forward and backward passes alone: a whole step needs fewer."""
    import torch

    import settings
    from modes.build import build_backbone, build_module

    wanted = settings.load(
        [
            *("model=tiny", f"model.length={length}", "algo=bamdlm", "block_size=16"),
            *("data=shakespeare", f"loader.global_batch_size={batch}", "wandb=null"),
            *("trainer.accelerator=cpu", "data.tokenizer_name_or_path=gpt2"),
        ]
    )
    tokenizer = gpt2()
    module = build_module(wanted, build_backbone(wanted, tokenizer, None), tokenizer)
    ids = torch.randint(tokenizer.vocab_size - 1, (batch, length))
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "row": torch.arange(batch),
    }
    times = []
    for _ in range(4):
        began = time.perf_counter()
        noise = module.noise(given, 1, batch)
        module.compute_loss(
            module.loss_inputs(given, module.interval, noise, training=True)
        ).mean.backward()
        times.append(time.perf_counter() - began)
    return batch * length / min(times[1:])


def memory(path: str, folder: str) -> dict:
    """Peak resident MB."""
    text = split_of(path)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        prepare(text, cache, max(CORES, 2))
    here, worker = (
        resource.getrusage(kind).ru_maxrss / 1024
        for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {"here": here, "worker": worker}


MEASURES = {
    "alone": alone,
    "prepared": prepared,
    "reading": reading,
    "loader": loader,
    "memory": memory,
}


def misses(figures):
    for row in figures["preparation"]:
        if row["ratio"] < OF_TOKENIZERS:
            yield f"(a) {row['cores']} cores: {row['ratio']:.2f} of tokenizers alone"
    for name in ("prepared", "streamed"):
        if figures["loader"][f"{name}_ratio"] < OVER_STEP:
            yield f"(b) {name}: {figures['loader'][f'{name}_ratio']:.1f} times the step"
    small, *others = figures["memory"]
    for row, where in itertools.product(others, ("here", "worker")):
        growth = row[where] - small[where]
        if growth >= GROWTH:
            yield f"(c) {row['megabytes']} MB of text: {growth:.0f} MB more {where}"


if __name__ == "__main__":
    sys.exit(main())
