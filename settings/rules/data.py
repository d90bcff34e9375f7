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
        yield (
            f"data.streaming=True does not go with data.train={data.train}, random windows of"
            f" prepared rows; use {other} or data.streaming=False"
        )
    if packed and not data.wrap:
        yield (
            f"data.pack={data.pack} does not go with data.wrap=False, which gives each document a"
            " row of its own: choose one"
        )
    if packed and windows and config.mode in ("train", "plan"):
        yield (
            f"data.pack={data.pack} has no meaning for data.train={data.train}, windows of one"
            f" document; use {other} or data.pack=wrap"
        )
    framed = (data.insert_train_special or data.insert_valid_special) and data.wrap
    if framed and not packed and config.model.length <= SPECIAL_TOKENS:
        yield (
            f"model.length={config.model.length} leaves no room between BOS and EOS;"
            " set data.insert_train_special=False and data.insert_valid_special=False"
        )


def chats(config: Config) -> Iterator[str]:
    """What goes with conversations."""
    data, packed = config.data, config.data.pack
    if data.format != "chat":
        return
    if packed != "whole":
        yield (
            f"data.pack={packed} does not go with data.format=chat, which packs whole"
            " conversations; use data.pack=whole"
        )
    if not data.wrap:
        yield "data.wrap=False does not go with data.format=chat; use data.wrap=True"
    for split in ("train", "valid"):
        for key in (f"insert_{split}_eos", f"insert_{split}_special"):
            if getattr(data, key):
                yield (
                    f"data.{key}=True does not go with data.format=chat, whose template sets all"
                    f" special tokens; use data.{key}=False"
                )
        if getattr(data, split) in known_corpora():
            yield (
                f"data.{split}={getattr(data, split)} is a corpus of plain text: data.format=chat"
                " needs .jsonl or .parquet files of conversations"
            )
    if data.text_column is not None:
        yield (
            f"data.text_column={data.text_column} does not go with data.format=chat; use"
            " data.chat_fields"
        )
    if config.training.resample and config.mode in ("train", "plan"):
        yield (
            "training.resample=True does not go with data.format=chat: a share of a block says"
            " nothing where only a part of it is masked; use training.noise=counts"
        )
