"""mode=prepare: tokenize the data of a training run and stop; continue where it was interrupted."""

from collections.abc import Callable

from data.token_rows import TokenRows
from modes.build_data import build_rows, build_tokenizer
from settings import Config
from utils import say


def prepare(config: Config) -> Callable[[], None]:
    """Prepare the splits that are set; the function returned says where they are. The training
    split of a streaming run is not prepared."""
    splits = ("valid",) if config.data.streaming else ("train", "valid")
    wanted = [split for split in splits if getattr(config.data, split) is not None]
    tokenizer = build_tokenizer(config)
    made = {split: build_rows(config, tokenizer, split) for split in wanted}

    def run() -> None:
        if not made:
            say("nothing to prepare: data.streaming=true reads the training split as it goes")
        for split, rows in made.items():
            say(f"{split}: {described(rows)}")

    return run


def described(rows: TokenRows) -> str:
    about, packed = rows.about, ""
    if "padding" in about:  # not noted of rows that were prepared earlier
        packed = f"{about['padding']:.2%} padding, {about['cut_documents']:,} documents cut; "
    return (
        f"{about['corpus']}, {about['documents']:,} documents, {about['tokens']:,} tokens,"
        f" {len(rows):,} rows of {rows.length} ({packed}{about['seconds']:,.1f} s) in {rows.folder}"
    )
