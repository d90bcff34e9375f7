"""What must hold between the settings of the data."""

from collections.abc import Iterator

from settings.schema import Config
from settings.tables import known_corpora

SPECIAL_TOKENS = 2  # BOS and EOS of a chunk


def data(config: Config) -> Iterator[str]:
    data, packed = config.data, config.data.pack != "wrap"
    entry = known_corpora().get(data.train, {})
    windows = entry.get("windows", False)
    other = f"data={entry['whole']}" if "whole" in entry else "another corpus"
    if data.streaming and windows and config.mode == "train":
        why = f"random windows of prepared rows; use {other} or data.streaming=False"
        yield f"data.streaming=True does not go with data.train={data.train}, {why}"
    if packed and not data.wrap:
        why = "which gives each document a row of its own: choose one"
        yield f"data.pack={data.pack} does not go with data.wrap=False, {why}"
    if packed and windows and config.mode in ("train", "plan"):
        why = f"windows of one document; use {other} or data.pack=wrap"
        yield f"data.pack={data.pack} has no meaning for data.train={data.train}, {why}"
    framed = (data.insert_train_special or data.insert_valid_special) and data.wrap
    if framed and not packed and config.model.length <= SPECIAL_TOKENS:
        way_out = "set data.insert_train_special=False and data.insert_valid_special=False"
        yield f"model.length={config.model.length} leaves no room between BOS and EOS; {way_out}"


def chats(config: Config) -> Iterator[str]:
    """What goes with conversations."""
    data, apart = config.data, "does not go with data.format=chat"
    if data.format != "chat":
        return
    if data.pack != "whole":
        why = "which packs whole conversations; use data.pack=whole"
        yield f"data.pack={data.pack} {apart}, {why}"
    if not data.wrap:
        yield f"data.wrap=False {apart}; use data.wrap=True"
    for split in ("train", "valid"):
        for key in (f"insert_{split}_eos", f"insert_{split}_special"):
            if getattr(data, key):
                why = f"whose template sets all special tokens; use data.{key}=False"
                yield f"data.{key}=True {apart}, {why}"
        if getattr(data, split) in known_corpora():
            why = "data.format=chat needs .jsonl or .parquet files of conversations"
            yield f"data.{split}={getattr(data, split)} is a corpus of plain text: {why}"
    if data.text_column is not None:
        yield f"data.text_column={data.text_column} {apart}; use data.chat_fields"
    if config.training.resample and config.mode in ("train", "plan"):
        why = "a share of a block says nothing where only a part of it is masked"
        yield f"training.resample=True {apart}: {why}; use training.noise=counts"
