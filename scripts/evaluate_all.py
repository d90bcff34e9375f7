"""One table of perplexities: checkpoints x corpora x likelihoods.

    python scripts/evaluate_all.py last.ckpt other.ckpt --data wikitext103,ptb \\
        --likelihood counts,exact --out table -- data.source=/corpora loader.eval_batch_size=16

Each pair of a checkpoint and a corpus is one mode=ppl_eval, in OUT.runs; what is there already, of
the same settings, is not measured again, and a stopped one goes on. What stands behind -- is for
every run. One that fails is named in the end, and the others go on. The table is printed and
written to OUT.txt, OUT.csv and OUT.md.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpointing.checkpoint import Checkpoint, section
from checkpointing.layouts import read_checkpoint
from checkpointing.load import build_backbone_args, is_llama
from checkpointing.trained import tokenizer_name
from modes.tables import csv_text, markdown, text
from scripts.support.command import new_parser, parsed
from settings.keys import choices
from utils import digest, read_json, say, shown, write_text

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    *("corpus", "model", "likelihood", "ppl", "ppl_error", "bits_per_byte", "tokens", "seconds"),
    "bound",
)


def main(argv=None) -> int:
    args, more = parsed(options(), argv)
    try:
        checkpoints = [(name, read_checkpoint(name)) for name in args.checkpoints]
        models = [(name, c, model_words(name, c, args) + more) for name, c in checkpoints]
    except ValueError as error:
        print(shown(error), file=sys.stderr)
        return 2
    table, failed = [], []
    for name, checkpoint, words in models:
        for corpus in args.data.split(","):
            key = "data" if corpus in choices("data") else "data.valid"
            run = [*words, f"{key}={corpus}"]
            folder = run_folder(args, checkpoint, run, corpus)
            found = evaluate(run, folder, args.likelihood)
            if found is None:
                failed.append(f"{name} on {corpus}")
                continue
            size = bytes_per_row(run) * found["rows"]
            table += [row(each, name, corpus, size) for each in found.get("likelihoods", [found])]
            write(args.out, table)
    if table:
        print(text(rows_of(table, figure)))
        say(f"written to {args.out}.txt, {args.out}.csv and {args.out}.md")
    for each in failed:
        print(shown(f"failed, not in the table: {each}"), file=sys.stderr)
    return 1 if failed else 0


def run_folder(args, checkpoint: Checkpoint, run: list[str], corpus: str) -> Path:
    """Of its own for other weights, settings and likelihoods, and for files of equal names."""
    said = [word for word in run if not word.startswith("eval.checkpoint_path=")]
    words = digest(json.dumps([*said, args.likelihood]), 8)
    return Path(f"{args.out}.runs", f"{checkpoint.fingerprint[:8]}-{Path(corpus).stem}-{words}")


def options() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", help=".ckpt, exported folder or hub id")
    parser.add_argument("--data", required=True, help="corpora or files, separated by commas")
    parser.add_argument("--likelihood", default="counts", help="separated by commas")
    parser.add_argument("--algo", help="where a checkpoint does not say")
    parser.add_argument("--block-size", type=int, help="the same")
    parser.add_argument("--out", default="evaluation", help="(%(default)s)")
    return parser


def model_words(name: str, checkpoint: Checkpoint, args) -> list[str]:
    """What a command line must say of the checkpoint. ValueError where it does not tell."""
    algo = args.algo or checkpoint.algo
    if algo is None:
        raise ValueError(f"{name} fits {' and '.join(checkpoint.algorithms)}: give --algo")
    size = args.block_size or checkpoint.block_size
    if algo == "bamdlm" and size is None:
        raise ValueError(f"{name} does not say its block size: give --block-size")
    words = [f"algo={algo}", f"eval.checkpoint_path={name}", "mode=ppl_eval", "wandb=null"]
    if algo == "bamdlm":
        words.append(f"block_size={size}")
    if checkpoint.length is not None:
        words.append(f"model.length={checkpoint.length}")
    words += ["algo.backbone=llama"] if is_llama(checkpoint) else dit_words(checkpoint, algo)
    if checkpoint.layout == "transformers":
        words.append(f"data.tokenizer_name_or_path={tokenizer_name(checkpoint)}")
    data = section(checkpoint.config, "data")
    keys = ("tokenizer_name_or_path", "eos_token")
    return words + [f"data.{key}={data[key]}" for key in keys if data.get(key) is not None]


def dit_words(checkpoint: Checkpoint, algo: str) -> list[str]:
    sizes = build_backbone_args(checkpoint)
    keys = ["hidden_size", "n_blocks", "n_heads"]
    if algo == "ar":
        keys.append("adaln")
    if sizes.get("adaln"):
        keys.append("cond_dim")
    return [f"model.{key}={sizes[key]}" for key in keys]


def evaluate(words: list[str], folder: Path, likelihoods: str) -> dict | None:
    """What mode=ppl_eval reports; None where it failed."""
    if not any(folder.glob("ppl_*.json")):
        command = [sys.executable, str(ROOT / "main.py"), *words]
        command += [f"eval.likelihood=[{likelihoods}]", f"checkpointing.save_dir={folder}"]
        if subprocess.run(command, check=False).returncode != 0:
            return None
    (path,) = folder.glob("ppl_*.json")
    return read_json(path)


def bytes_per_row(words: list[str]) -> float:
    """Of the text that the rows of the validation split hold, without special tokens."""
    import settings
    from modes.build_data import build_rows, build_tokenizer

    config = settings.load(words)
    tokenizer = build_tokenizer(config)
    rows, special = build_rows(config, tokenizer, "valid"), set(tokenizer.hf.all_special_ids)
    total = 0
    for number in range(len(rows)):
        ids, mask = rows.read([number])
        kept = [i for i in ids[0][mask[0] > 0].tolist() if i not in special]
        total += len(tokenizer.decode(kept).encode())
    return total / len(rows)


def row(entry: dict, model: str, corpus: str, size: float) -> dict:
    bits = entry["nll"] * entry["tokens"] / math.log(2) / size if size else math.nan
    named = {"corpus": corpus, "model": model, "bits_per_byte": bits}
    return {key: named.get(key, entry.get(key)) for key in COLUMNS}


def rows_of(table: list[dict], form=lambda value: value) -> list[list]:
    """With a header. form: how a cell is written."""
    return [[*COLUMNS], *([form(each[key]) for key in COLUMNS] for each in table)]


def figure(value) -> str:
    """As it is read."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 1000 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write(out: str, table: list[dict]) -> None:
    read = rows_of(table, figure)
    contents = {
        "txt": text(read) + "\n",
        "md": markdown(read) + "\n",
        "csv": csv_text(rows_of(table)),
    }
    for suffix, content in contents.items():
        write_text(f"{out}.{suffix}", content)


if __name__ == "__main__":
    sys.exit(main())
