"""The command line of generate_text.py, and what can be checked before torch is imported."""

import argparse
import difflib
import math
import os
from pathlib import Path

from ssd_folder import folder_problems, looks_like_hub_id

DOCUMENT_TOKENS = 25
EXAMPLES = """examples:
  python ssd-lm/try_it.py            a tiny model of its own making, in a minute
  python ssd-lm/generate_text.py --model_name_or_path xhan77/ssdlm \\
      --num_samples_to_generate 8 --max_seq_length 1025 --total_t 1000 --seed 1
  python ssd-lm/generate_text.py --model_name_or_path FOLDER --prompts_file prompts.txt"""
ROOT = Path(__file__).resolve().parent.parent
HUB_ID = "a hub id such as xhan77/ssdlm"

# name, default, type, metavar, help
OPTIONS = (
    ("model_name_or_path", "xhan77/ssdlm", str, "PATH_OR_ID", "a local folder or a hub id"),
    ("tokenizer_name", None, str, "PATH_OR_ID", "if it is not beside the model"),
    ("num_samples_to_generate", None, int, "N", "1 if not given, or one per line of prompts"),
    ("max_seq_length", 1025, int, "TOKENS", "of a sample, its prompt not counted"),
    ("total_t", 1000, int, "T", "steps per block"),
    ("decoding_block_size", 25, int, "TOKENS", "what the model was trained with"),
    ("projection_top_p", 0.95, float, "P", "share of the mass a projection may draw from"),
    ("one_hot_value", 5.0, float, "K", "height of the simplex's logits"),
    ("seed", 1, int, "SEED", "sample i is a function of (seed, i)"),
    ("batch_size", 8, int, "B", "samples at once"),
    ("prompts_file", None, str, "FILE", "one prompt per line; samples take them in turn"),
    ("prompts_data", None, str, "NAME", "validation texts of a data set, named as in data=NAME"),
    ("prompt_tokens", None, int, "N", "first tokens of each such text (25)"),
    ("output_dir", "sample_logs/ssd-lm", str, "FOLDER", "where the file of samples lies"),
    ("out_fn", None, str, "NAME", "ssdlm_len<length>_T<steps>_seed<seed>.jsonl if not given"),
    ("device", None, str, "DEVICE", "the accelerator if there is one, else cpu"),
)


class Parser(argparse.ArgumentParser):
    """Says which option an unknown one may have meant."""

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], known, n=1)
            hint = f", did you mean {near[0]}?" if near else "; --help lists them all"
            self.error(f"there is no option {word}{hint}")
        return parsed


def parser() -> Parser:
    made = Parser(
        prog="generate_text.py",
        description="Text from SSD-LM: simplex diffusion, block by block; a line of JSON each.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, default, kind, metavar, text in OPTIONS:
        shown = "" if default is None else " (%(default)s)"
        made.add_argument(
            f"--{name}", default=default, type=kind, metavar=metavar, help=text + shown
        )
    made.add_argument("--no_bos", action="store_true", help="no <s> before the text or its prompt")
    return made


def blocks_of(args) -> int:
    """Enough whole blocks for max_seq_length; what is beyond it is cut off."""
    return math.ceil(args.max_seq_length / args.decoding_block_size)


def out_path(args) -> Path:
    name = args.out_fn or f"ssdlm_len{args.max_seq_length}_T{args.total_t}_seed{args.seed}.jsonl"
    return Path(args.output_dir).expanduser() / name


def problems(args) -> list[str]:
    """One sentence for each thing that keeps these arguments from running."""
    found = []
    for name in ("max_seq_length", "total_t", "decoding_block_size", "batch_size"):
        if getattr(args, name) < 1:
            found.append(f"--{name}={getattr(args, name)} must be at least 1")
    if args.num_samples_to_generate is not None and args.num_samples_to_generate < 1:
        found.append(f"--num_samples_to_generate={args.num_samples_to_generate} must be at least 1")
    if not 0 < args.projection_top_p <= 1:
        found.append(f"--projection_top_p={args.projection_top_p} must be in (0, 1]")
    if not (args.one_hot_value > 0 and math.isfinite(args.one_hot_value)):
        found.append(f"--one_hot_value={args.one_hot_value} must be a positive number")
    if not 0 <= args.seed < 1 << 63:
        found.append(f"--seed={args.seed} must be in 0 … 2^63 - 1")
    return found + _prompt_problems(args) + _file_problems(args)


def _prompt_problems(args) -> list[str]:
    found = []
    if args.prompts_file and args.prompts_data:
        found.append("--prompts_file and --prompts_data are both given: take one")
    if args.prompt_tokens is not None and not args.prompts_data:
        found.append("--prompt_tokens cuts the texts of --prompts_data, which is not given")
    if args.prompt_tokens is not None and args.prompt_tokens < 1:
        found.append(f"--prompt_tokens={args.prompt_tokens} must be at least 1")
    if args.prompts_data and args.num_samples_to_generate is None:
        found.append("--prompts_data needs --num_samples_to_generate: one text is taken for each")
    if args.prompts_data:
        try:
            validation_corpus(args.prompts_data)
        except ValueError as error:
            found.append(f"--prompts_data={args.prompts_data}: {error}")
    if args.prompts_file:
        try:
            if not read_prompts(args.prompts_file):
                found.append(f"--prompts_file={args.prompts_file} holds no line with text")
        except (OSError, UnicodeDecodeError) as error:
            found.append(f"--prompts_file={args.prompts_file} cannot be read: {error}")
    return found


def _file_problems(args) -> list[str]:
    found = []
    for option in ("model_name_or_path", "tokenizer_name"):
        given = getattr(args, option)
        if given is None:
            continue
        folder = Path(given).expanduser()
        if not folder.is_dir() and (folder.exists() or not looks_like_hub_id(given)):
            found.append(f"--{option}={given} is neither a folder nor {HUB_ID}")
        elif folder.is_dir() and option == "model_name_or_path":
            found += folder_problems(folder)
    if args.out_fn and Path(args.out_fn).name != args.out_fn:
        found.append(f"--out_fn={args.out_fn} must be a file name; its folder is --output_dir")
    elif out_path(args).is_dir():
        found.append(f"{out_path(args)} is a folder: choose another --out_fn")
    parent = Path(args.output_dir).expanduser()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        found.append(f"--output_dir={args.output_dir}: {parent} is a file, not a folder")
    elif not os.access(parent, os.W_OK):
        found.append(f"--output_dir={args.output_dir}: {parent} is not writable")
    return found


def read_prompts(file: str) -> list[str]:
    """The lines that hold text, without their line ends."""
    lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]


def validation_corpus(name: str):
    """Corpus, revision and cache folder behind data=NAME; NAME may also be a file of text."""
    from data import corpora
    from settings import load

    known = ROOT / "configs" / "data" / f"{name}.yaml"
    data = load([f"data={name}"] if known.is_file() else []).data
    valid, revision = (data.valid, data.valid_revision) if known.is_file() else (name, None)
    return corpora.get_corpus(valid, "valid"), revision, Path(data.cache_dir)
