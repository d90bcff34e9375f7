"""Texts that scripts compare: from a file of samples, a plain file, or a corpus."""

from collections.abc import Sequence
from pathlib import Path

import settings
from modes.build_data import build_cache, build_rows, build_tokenizer
from random_streams import order
from sampling.prompts import lines_of_text
from sampling.sample_file import SampleFile
from settings.keys import choices
from utils import check_file


def cache_folder(words: Sequence[str] = ()) -> str:
    """Where tokenizers that are trained here are kept; words: overrides of main.py."""
    return build_cache(settings.load(list(words))).folder


def corpus_texts(name: str, length: int, count: int | None, words: Sequence[str]) -> list[str]:
    """Whole rows of the validation split of data=NAME, `count` of them or as many as there are,
    from random places. ValueError where there is no such corpus."""
    if name not in (known := choices("data")):
        corpora = ", ".join(known)
        raise ValueError(f"{name} is neither a file nor a corpus: a corpus is one of {corpora}")
    special = ["data.insert_valid_special=false"]
    config = settings.load([f"data={name}", f"model.length={length}", *special, *words])
    tokenizer = build_tokenizer(config)
    rows = build_rows(config, tokenizer, "valid")
    chosen = order(1, "rows", 0, len(rows))[:count]
    ids, mask = rows.read(sorted(chosen.tolist()))
    return [tokenizer.decode(row.tolist()) for row in ids[mask.all(1)]]


def read_texts(source: str, length: int, count: int | None, words: Sequence[str] = ()) -> list[str]:
    """.txt: a text a line; .jsonl: the field `text`; .csv: samples of this project; else the name
    of a corpus, whose validation rows of `length` tokens are texts."""
    path = Path(source)
    if not path.suffix and not path.exists():
        return corpus_texts(source, length, count, words)
    if path.suffix not in (".csv", ".txt", ".jsonl"):
        raise ValueError(f"{path} must be a .txt, .jsonl or .csv file, or the name of a corpus")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.suffix == ".csv":
        found = [row.samples for row in SampleFile(path)]
    else:
        check_file(path)
        found = lines_of_text(path, "text", str(path))
    if not found:
        raise ValueError(f"{source} has no text")
    return found[:count]
