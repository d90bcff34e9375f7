"""Samples of SSD-LM: `python ssd-lm/generate_text.py --help`, and README.md in this folder.

Nothing is written before the arguments are checked and the model is loaded. The same command again
completes a file that a killed run left behind, and does nothing when all samples exist.
"""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # samplers, corpora of the project

from ssd_folder import ModelError, find_folder, fingerprint
from ssd_options import blocks_of, out_path, parser, problems
from ssd_prompts import PromptError, check_lengths, contexts
from ssd_samples import SamplesError, SampleStream, finished

from utils import CIRCUMSTANCES, reason, shown


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        found = problems(args)
    except CIRCUMSTANCES as error:
        found = [reason(error)]
    if found:
        return refuse(found)
    try:
        run(args)
    except (ModelError, PromptError, SamplesError) as error:
        return refuse([reason(error)])
    except OSError as error:
        print(
            f"stopped: {shown(reason(error))}; finished samples are kept, the same command goes on",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with what is missing", file=sys.stderr)
        return 130
    return 0


def refuse(found: list[str]) -> int:
    lines = "\n".join(f"  - {shown(problem)}" for problem in found)
    print(f"this run cannot start:\n{lines}", file=sys.stderr)
    return 2


def run(args) -> None:
    folder = find_folder(args.model_name_or_path)
    tokenizer_folder = find_folder(args.tokenizer_name) if args.tokenizer_name else folder
    from ssd_model import check_tokenizer, load_model, load_tokenizer, pick_device
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the weights; the samples have their own

    device = pick_device(args.device)
    tokenizer = load_tokenizer(tokenizer_folder)
    before = contexts(args, tokenizer)
    wanted = range(args.num_samples_to_generate or len(before))
    path, stamp = out_path(args), settings(args, folder, tokenizer, before, device)
    if finished(path, stamp).issuperset(wanted):
        print(f"{path}: all {len(wanted)} samples are there")
        return
    model = load_model(folder, device)
    check_tokenizer(tokenizer, model.vocab_size)
    check_lengths(before, args.decoding_block_size, model.max_tokens)
    announce_cut(args)
    with SampleStream(path, stamp) as file:
        missing = [index for index in wanted if index not in file.done]
        generate(args, model, tokenizer, before, missing, file)
        print(f"{path}: {len(file.done)} samples, {len(missing)} of them new")


def announce_cut(args) -> None:
    """A sample has exactly max_seq_length tokens; whole blocks are decoded for it."""
    size, length = args.decoding_block_size, args.max_seq_length
    surplus = blocks_of(args) * size - length
    if surplus:
        print(
            f"--max_seq_length={length} is no multiple of --decoding_block_size={size}: "
            f"{blocks_of(args)} blocks are decoded and the last {surplus} tokens cut off"
        )


def generate(args, model, tokenizer, before, missing: list[int], file: SampleStream) -> None:
    """Batch by batch; a batch's samples are written when it is done, its blocks as they are."""
    from tqdm import tqdm

    steps = len(missing) * blocks_of(args) * args.total_t
    with tqdm(total=steps, unit="step", smoothing=0.05, disable=None) as bar:
        for start in range(0, len(missing), args.batch_size):
            rows = missing[start : start + args.batch_size]
            inputs = [before[row % len(before)] for row in rows]
            decoded = decode_rows(args, model, rows, inputs, file, bar)
            shared = {
                "model": args.model_name_or_path,
                "total_seq_time": decoded.seconds,
                "avg_block_time": decoded.seconds / blocks_of(args),
                "avg_decode_step_time": decoded.seconds / decoded.nfe,
                "nfe": decoded.nfe,
                "batch_size": len(rows),
            }
            file.append(
                [
                    record(row, context, ids[: args.max_seq_length], tokenizer) | shared
                    for row, context, ids in zip(rows, inputs, decoded.tokens, strict=True)
                ]
            )
            rate = len(rows) * args.max_seq_length / decoded.seconds
            bar.write(
                f"samples {rows[0]} to {rows[-1]}: {decoded.seconds:.1f} s, {rate:.1f} tokens/s, "
                f"{decoded.nfe} evaluations each"
            )


def decode_rows(args, model, rows: list[int], inputs: list[list[int]], file: SampleStream, bar):
    from ssd_decode import Block, RowNoise, decode

    size = (args.decoding_block_size, model.vocab_size)
    done = [Block(*block) for block in file.unfinished(rows)]
    bar.update(len(done) * args.total_t * len(rows))
    return decode(
        model,
        inputs,
        lambda block: RowNoise(args.seed, rows, block, size, model.device),
        blocks=blocks_of(args),
        total_t=args.total_t,
        top_p=args.projection_top_p,
        one_hot_value=args.one_hot_value,
        done=done,
        on_step=lambda: bar.update(len(rows)),
        on_block=lambda blocks: file.keep(rows, [(b.tokens, b.seconds) for b in blocks]),
    )


def record(index: int, context: list[int], ids: list[int], tokenizer) -> dict:
    return {
        "index": index,
        "context_sequences": tokenizer.decode(context) if context else None,
        "sampled_sequences": tokenizer.decode(ids),
        "token_ids": ids,
    }


def settings(args, folder: Path, tokenizer, before: list, device) -> dict:
    """What a sample depends on beside its index; a file holds samples of one such set. The model
    is known by its files, however its path is spelt."""
    return {
        "files": fingerprint(folder),
        "vocabulary": digest(sorted(tokenizer.get_vocab().items())),
        "special_tokens": sorted(set(tokenizer.all_special_tokens)),
        "eos_token_id": tokenizer.eos_token_id,
        "max_seq_length": args.max_seq_length,
        "total_t": args.total_t,
        "decoding_block_size": args.decoding_block_size,
        "projection_top_p": args.projection_top_p,
        "one_hot_value": args.one_hot_value,
        "seed": args.seed,
        "contexts": digest(before),
        "device": device.type,
    }


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
