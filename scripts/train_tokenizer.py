"""Train a tokenizer on your text: a folder for data.tokenizer_name_or_path.

    python scripts/train_tokenizer.py --files 'texts/*.jsonl' --vocab_size 8192 --out FOLDER
    python scripts/train_tokenizer.py data=wikitext2 --vocab_size 8192 --out FOLDER
    python scripts/train_tokenizer.py --files molecules.txt --characters --out FOLDER

The default is a byte-level BPE: every text has ids, nothing is lower-cased or cut. --characters
gives one id to each character that occurs, and refuses others later. Documents end with
<|endoftext|>, which also begins them; the mask is added when the tokenizer is used, so that the
model's vocabulary is one larger. The same text gives the same folder. Settings of main.py that say
where text lies (data=…, data.train, data.source, data.text_column) are taken as they are there.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import settings
from data import corpora, detokenizers, tokenizer, vocabularies
from data.preparation import Report
from data.remote_cache import open_cache
from main import quiet
from scripts.support.command import answered, new_parser
from settings.defaults import user_cache
from settings.schema import Data
from utils import atomic_folder, say

SAMPLE_CHARACTERS = 1 << 20  # of the beginning of the text; compression is measured on them
LARGEST = 1 << 24
SETTING = re.compile(r"data(\.\w+)?=")
LEAST = vocabularies.BYTES + 1  # with <|endoftext|>


def texts(names: list[str], data: Data, report: Report, sample: list[str]) -> Iterator[str]:
    """The training text of all corpora, in pieces, detokenized as for training. The first go into
    `sample` as well."""
    cache = open_cache(data.cache_dir, user_cache()).folder
    with report:
        for number, name in enumerate(names):
            entry = corpora.get_corpus(name, "train", source=data.source)
            column = data.text_column or entry.column
            for piece in corpora.opened(entry, "train", data.train_revision, column, cache)[1]:
                rules = entry.detokenizer
                text = detokenizers.detokenize(rules, piece.text) if rules else piece.text
                if report.tokens < SAMPLE_CHARACTERS:
                    sample.append(text)
                report(len(text), piece.ends, (number + piece.done) / len(names))
                yield text


def train(arguments: argparse.Namespace, data: Data, out: Path) -> None:
    report, begun = Report("reading", "characters"), []
    pieces = texts(arguments.files or [data.train], data, report, begun)
    if arguments.characters:
        found = sorted(set(itertools.chain.from_iterable(pieces)))
        hf = vocabularies.character_set(found) if found else None
    else:
        # the merges follow when all is read
        hf = vocabularies.train_bpe(pieces, arguments.vocab_size, show_progress=sys.stderr.isatty())
    if not report.tokens:
        raise ValueError("there is no text to train on: every document is empty")
    made = tokenizer.wrap(hf, str(out))
    with atomic_folder(out) as new:
        hf.save_pretrained(str(new))
    sample = "".join(begun)[:SAMPLE_CHARACTERS]
    size, tokens = len(sample.encode()), len(made.encode(sample))
    say(f"{report.tokens:,} characters read -> {out}")
    if arguments.characters:
        say(f"{len(found)} characters: {''.join(found)!r}")
    elif len(hf) < arguments.vocab_size:
        say(f"the text gives {len(hf)} ids, not --vocab_size {arguments.vocab_size}")
    say(
        f"vocabulary {made.vocab_size}: {len(hf)} ids, then the mask ({made.mask_id}); BOS and EOS"
        f" {made.eos_id} {vocabularies.END_OF_TEXT}; padding as the mask"
    )
    say(f"{size / tokens:.2f} bytes per token on the first {size:,} bytes")
    say(f"use it with data.tokenizer_name_or_path={out}")


def check(arguments: argparse.Namespace, data: Data, out: Path) -> None:
    if out.exists():
        raise ValueError(f"--out {out} exists: name a new folder, or remove it")
    if arguments.files and data.train is not None:
        raise ValueError(
            f"--files and data.train={data.train} both name text: leave one of them out"
        )
    if data.format != "text":
        raise ValueError(
            f"data.format={data.format}: a tokenizer is trained on text; use data=files, and"
            " data.text_column for a field of it"
        )
    if not arguments.characters and arguments.vocab_size is None:
        raise ValueError("--vocab_size is missing (or --characters for an id per character)")
    if arguments.characters and arguments.vocab_size is not None:
        raise ValueError(
            f"--vocab_size {arguments.vocab_size} has no meaning with --characters: the text says"
            " how many there are"
        )
    if not arguments.characters and not LEAST <= arguments.vocab_size <= LARGEST:
        raise ValueError(
            f"--vocab_size {arguments.vocab_size} must be from {LEAST} (the bytes and"
            f" {vocabularies.END_OF_TEXT}) to {LARGEST}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="data.KEY=VALUE", help="as for main.py")
    parser.add_argument(
        "--files", nargs="+", metavar="PATTERN", help=".txt, .jsonl or .parquet files, or folders"
    )
    parser.add_argument("--vocab_size", "--vocab-size", type=int, help="ids, <|endoftext|> counted")
    parser.add_argument("--characters", action="store_true", help="one id for each character")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    arguments = parser.parse_intermixed_args(argv)
    # --files takes all words up to the next option
    behind = [word for word in arguments.files or [] if SETTING.match(word)]
    arguments.files = [word for word in arguments.files or [] if word not in behind]
    quiet()
    return answered("train_tokenizer", lambda: run(arguments, [*arguments.settings, *behind]))


def run(arguments: argparse.Namespace, chosen: list[str]) -> None:
    """chosen: settings of main.py."""
    if not any(word.startswith("data=") for word in chosen):
        chosen = ["data=files", *chosen]
    data, out = settings.load(chosen).data, arguments.out.expanduser()
    check(arguments, data, out)
    train(arguments, data, out)


if __name__ == "__main__":
    sys.exit(main())
