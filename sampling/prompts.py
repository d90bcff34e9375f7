"""Prompts: from a file or a line to the ids that a text begins with.

BOS comes first. Where gaps are to be filled, each `[MASK]` stands for one masked token. Spaces
beside it are kept where they are tokens of their own, as in sets of characters. Where words begin
with their space, as in GPT-2, the space before a run of masks belongs to the run.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from utils import reason

HALF_A_PAIR = re.compile("[\ud800-\udfff]")
MOST_BYTES = 1 << 24  # of a file of prompts
MASKS = re.compile(r"((?:\[MASK\])+)")
MASKS_AND_SPACES = re.compile(r"\s*((?:\[MASK\]\s*)*\[MASK\])")


def read_prompts(path: str | Path) -> list[str]:
    """.txt: one prompt a line, empty lines left out; .jsonl: objects with the field `prompt`."""
    path, name = Path(path), f"sampling.prompts={path}"
    if not path.is_file():
        raise ValueError(f"{name} does not exist")
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{name} must be a .txt or .jsonl file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{name} has more than {MOST_BYTES:,} bytes")
    prompts = lines_of_text(path, "prompt", name)
    if not prompts:
        raise ValueError(f"{name} is empty: write one prompt a line")
    return prompts


def lines_of_text(path: Path, field: str, name: str) -> list[str]:
    """One text a line, empty lines left out; .jsonl has it under `field`. name: of the file, in
    messages. ValueError where a line is something else."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error.reason})") from error
    found = {number: line for number, line in enumerate(lines, 1) if line.strip()}
    if path.suffix != ".jsonl":
        return list(found.values())
    return [_record(line, field, f"{name}, line {number}") for number, line in found.items()]


def _record(line: str, field: str, where: str) -> str:
    """The text of a line of .jsonl; `where` names the line in messages."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets
        raise ValueError(f"{where} cannot be read: {reason(error)}") from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        raise ValueError(f"{where} must be an object with a text under `{field}`")
    if HALF_A_PAIR.search(record[field]):
        raise ValueError(f"{where}: the {field} has half of a surrogate pair, which is no text")
    return record[field]


def encode_prompts(
    prompts: Sequence[str], tokenizer, *, infill: bool, length: int, context_size: int
) -> list[tuple[int, ...]]:
    """Ids of each prompt, BOS first; with `infill` masked tokens where `[MASK]` stands.

    length: tokens of a text; context_size: tokens that are visible at once.
    """
    found = []
    for number, prompt in enumerate(prompts, 1):
        name = f"prompt {number} ({prompt[:40]!r})"
        gaps = "[MASK]" in prompt
        if HALF_A_PAIR.search(prompt):
            raise ValueError(f"{name} holds bytes or half of a pair, which are no text")
        if gaps and not infill:
            raise ValueError(f"{name} has a [MASK]: set sampling.infill=true to have it filled")
        if infill and not gaps:
            raise ValueError(
                f"{name} has no [MASK] to fill: mark the gaps, or leave sampling.infill out"
            )
        ids = tokenizer.bos_id, *_with_gaps(prompt, tokenizer)
        limit = length if infill else length - 1
        if len(ids) > limit:
            raise ValueError(
                f"{name} has {len(ids)} tokens with BOS, a text of model.length={length} has room"
                f" for {limit}: shorten it or set a greater model.length"
            )
        if len(ids) > context_size:
            raise ValueError(
                f"{name} has {len(ids)} tokens with BOS, more than the {context_size} that are"
                " visible at once: shorten it or raise sampling.context_size"
            )
        found.append(ids)
    return found


def _with_gaps(prompt: str, tokenizer) -> list[int]:
    ids, apart = [], len(tokenizer.encode(" a")) > len(tokenizer.encode("a"))
    for i, piece in enumerate((MASKS if apart else MASKS_AND_SPACES).split(prompt)):
        if i % 2:
            ids += [tokenizer.mask_id] * piece.count("[MASK]")
        elif piece:
            ids += tokenizer.encode(piece)
    return ids
