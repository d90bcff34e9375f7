"""BrierLM of checkpoints: how well what they write goes on as real texts do.

    python scripts/brier.py my_run/checkpoints/last.ckpt other_run/checkpoints/last.ckpt \\
        --reference shakespeare --set steps=confidence

From each of --prefixes real texts one prefix is taken, of random length, and the model writes four
tokens behind it, --draws times. No probability is needed, so algorithms and samplers of all kinds
can be compared, where their tokens are the same. docs/evaluation.md has the definition. What stands
behind -- are settings of main.py for the data, such as data.source=/corpora.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from checkpointing.load import say_untrained
from evaluation.brier import BrierLM, brier_lm, closed_form, continuations, cut, estimates
from evaluation.quality import mean
from modes import tables
from samplers.params import SamplingParams
from samplers.writing import SAMPLERS, check
from sampling.notebook import Writer, load
from sampling.report import NUMBERS, read_numbers
from scripts.support.command import answered, at_least, chosen_device, new_parser, parsed
from scripts.support.texts import cache_folder, read_texts
from utils import write_json


def main(argv=None) -> int:
    args, words = parsed(options(), argv)
    return answered("brier", lambda: run(args, words))


def run(args: argparse.Namespace, words: list[str]) -> None:
    writers = {path: writer_of(path, args, words) for path in args.checkpoints}
    read = {name for each in writers.values() for name in reads(*each)}
    for name in dict(args.set).keys() - read:
        raise ValueError(f"--set {name}: no checkpoint reads it with these steps, leave it out")
    found = {path: measured(path, *each, args, words) for path, each in writers.items()}
    told = {path: figures(*each) for path, each in found.items()}
    print(as_text(told))
    for path, (each, _) in found.items():
        few = [f"Brier-{n}" for n, figure in each.orders.items() if not figure.value > 0]
        if few:
            print(f"{path}: {', '.join(few)} not above 0: take more --prefixes or --draws")
    if args.out:
        write_json(args.out, {path: as_dict(each) for path, each in told.items()})


def options() -> argparse.ArgumentParser:
    def setting(text: str):
        name, _, value = text.partition("=")
        if name not in NUMBERS:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(NUMBERS)}")
        return name, NUMBERS[name](value)

    parser = new_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", help=".ckpt, exported folder or hub id")
    parser.add_argument("--reference", required=True, help="real texts: a file or a corpus")
    parser.add_argument("--prefixes", type=at_least(2), default=512, help="(%(default)s)")
    parser.add_argument("--draws", type=at_least(2), default=4, help="of each (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", help="(the accelerator, if there is one)")
    parser.add_argument("--out", type=Path, help="a .json file")
    return parser


def writer_of(path: str, args, words) -> tuple[Writer, SamplingParams]:
    """A checkpoint, and how it is asked."""
    writer = load(path, device=chosen_device(args.device), cache_dir=cache_folder(words))
    changes = {"batch_size": args.batch_size, "seed": args.seed} | dict(args.set)
    params = writer.asked(changes)
    check(params, writer.writes)
    if "block_size" in changes:
        if writer.writes != "bamdlm":
            raise ValueError(
                f"--set block_size: {path} holds {writer.algo} weights, without blocks"
            )
        say_untrained(writer.trained, [params.block_size])
    return writer, params


def reads(writer: Writer, params: SamplingParams) -> set[str]:
    """The names of --set that decide its texts."""
    found = read_numbers(writer.algo, params) & NUMBERS.keys()
    return found if "steps" in SAMPLERS[writer.writes].can else found - {"steps"}


def measured(
    path: str, writer: Writer, params: SamplingParams, args, words
) -> tuple[BrierLM, dict]:
    """BrierLM of a checkpoint, and of ar Brier-1 from its probabilities."""
    texts = read_texts(args.reference, params.length, args.prefixes, words)
    rows = writer.tokenizer.encode_batch(texts)
    prefixes, truth = cut(rows, params.bos_id, params.length, args.seed)
    if len(prefixes) < 2:
        raise ValueError(f"{args.reference} has fewer than two texts of more than four tokens")
    with tqdm(total=len(prefixes) * args.draws, desc=path, disable=None) as bar:
        drawn = continuations(
            writer.writes,
            writer.denoiser(params),
            prefixes,
            params,
            draws=args.draws,
            device=writer.device,
            tick=bar.update,
        )
    warped = params.warp != SamplingParams(length=1, bos_id=0, eos_id=0).warp
    exact = exact_first(writer, prefixes, truth) if writer.writes == "ar" and not warped else {}
    return brier_lm(estimates(drawn, truth)), exact


def exact_first(writer: Writer, prefixes, truth: torch.Tensor) -> dict:
    """Brier-1 without draws, at temperature 1."""
    found = []
    for prefix, behind in zip(prefixes, truth, strict=True):
        log_probs = writer.log_probs([*prefix, 0], [len(prefix)])[0].cpu()
        found.append(float(closed_form(log_probs, behind[:1])))
    return {"Brier-1 exact": mean(found)}


def as_text(told: dict[str, dict]) -> str:
    columns = dict.fromkeys(name for each in told.values() for name in each)
    rows = [[path, *(each.get(name) for name in columns)] for path, each in told.items()]
    return tables.text([["", *columns], *rows])


def figures(found: BrierLM, exact: dict) -> dict:
    orders = {f"Brier-{n}": figure for n, figure in found.orders.items()}
    return {f"BrierLM-n{found.prefixes}": found.value, **orders, **exact}


def as_dict(told: dict) -> dict:
    return {name: figure.as_dict() for name, figure in told.items()}


if __name__ == "__main__":
    sys.exit(main())
