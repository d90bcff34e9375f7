"""The row of the mask token in a model of transformers: they have none of their own.

The tokenizer gives it the first id behind all its tokens (data/tokenizer.py). Where the embedding
has a row there, one of those kept spare (Qwen), it is taken as it is; where it ends before, one row
is added, the mean of the others.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpointing.checkpoint import Checkpoint
from checkpointing.load import EMBEDDING
from checkpointing.restricted_pickle import CheckpointError
from data.tokenizer import Tokenizer, get_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TABLES = (EMBEDDING, "lm_head.weight")


def with_mask(found: Checkpoint, words: Tokenizer, name: str) -> tuple[Checkpoint, str | None]:
    """The checkpoint with a row for the mask, and what was done, in a sentence; any other than a
    model of transformers as it is. name: of the tokenizer. CheckpointError where it has other
    ids."""
    table = found.weights.get(EMBEDDING)
    if found.layout != "transformers" or table is None or table.dim() != 2:
        return found, None  # in the second case the network will not fit, and that is the error
    _check_words(found, words, name)
    rows, mask = len(table), words.mask_id
    trained = found.config.get("mask_token_id")
    if trained not in (None, mask):
        raise CheckpointError(
            f"{found.source} was trained with the mask token of id {trained!r}, and that of the"
            f" tokenizer {name} has id {mask}: set data.tokenizer_name_or_path to its own"
        )
    if words.vocab_size <= rows:
        own = words.hf.mask_token_id == mask
        kind = "the tokenizer's own" if own else f"a spare row of {rows:,}"
        return found, f"mask token: id {mask:,}, {kind}"
    if not mask == rows == words.vocab_size - 1:
        raise CheckpointError(
            f"{found.source} has a vocabulary of {rows:,} ids, the tokenizer {name} of"
            f" {words.vocab_size:,} (mask included); give data.tokenizer_name_or_path as the one it"
            " was trained with"
        )
    if found.config.get("vocab_size") != rows:
        return found, None  # likewise
    weights = {k: with_mean(v) if k in TABLES else v for k, v in found.weights.items()}
    made = replace(found, weights=weights, config={**found.config, "vocab_size": rows + 1})
    return made, f"mask token: id {mask:,}, a new row, the mean of the {rows:,} embeddings"


def place_of(found: Checkpoint) -> str:
    """Of a model of transformers: its folder, or its hub id without the revision."""
    return re.split(r"@| \(revision ", found.source)[0]


def has_words(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def _check_words(found: Checkpoint, words: Tokenizer, name: str) -> None:
    """CheckpointError where the model has a tokenizer beside it, and this is another: with spare
    rows the sizes would not tell."""
    place = place_of(found)
    folder = Path(os.path.expanduser(place))
    if "://" in place or name == place or (folder.exists() and not has_words(folder)):
        return
    end = words.hf.convert_ids_to_tokens(words.eos_id)
    own = get_tokenizer(place)
    if end in own.hf.get_vocab():
        own = get_tokenizer(place, eos_token=end)
    if own.fingerprint != words.fingerprint:
        raise CheckpointError(
            f"{found.source} has its own tokenizer ({own.vocab_size:,} ids, mask {own.mask_id}),"
            f" and data.tokenizer_name_or_path={name} is another ({words.vocab_size:,} ids, mask"
            f" {words.mask_id}): set data.tokenizer_name_or_path={place}"
        )


def with_mean(table: Tensor) -> Tensor:
    """table [V, E] with the mean of its rows below them, [V + 1, E]."""
    return torch.cat([table, table.float().mean(0, keepdim=True).to(table.dtype)])
