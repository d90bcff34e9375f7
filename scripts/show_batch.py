"""Show what training sees: rows as text, and figures about the data.

    python scripts/show_batch.py data=shakespeare model.length=256 block_size=16
    python scripts/show_batch.py data=files data.train=a.jsonl data.valid=b.jsonl \\
        data.pack=documents --rows 2 --histogram lengths.png

Settings are those of main.py; the data are prepared as training would, where they are not yet. In a
row, blocks alternate in colour and have │ between them, BOS, EOS and other special tokens stand
out, ↵ is a line break and ▒ padding; with data.pack=documents each document has its line, with
training.block_sizes each row the blocks that it draws, with training.block_schedule those of its
step. Of conversations (data=chat) what is learnt stands in ⟦ ⟧. Figures are of the rows from there
on and of the split's first documents, --tokens tokens of each.
"""

import argparse
import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console
from rich.text import Text

from data.split import Split
from data.token_rows import TokenRows
from data.tokenizer import Tokenizer
from dataloader import DataModule
from main import quiet
from modes import cli
from modes.build import build_sizes
from modes.build_data import build_cache, build_data, build_split, build_tokenizer
from objectives.corruption import SIZES
from objectives.sizes import deal, size_at
from scripts.support.command import answered, new_parser
from scripts.support.picture import picture
from settings import Config
from utils import escaped

SPECIAL, PADDING, BORDER = "bold black on yellow", "dim", "dim red"
BLOCKS = ("", "cyan")  # in turn
PIECES_AT_ONCE = 16
SHOWN = str.maketrans({"\n": "↵", "\t": "⇥"})


def printable(text: str) -> str:
    """Without what a terminal would obey."""
    return escaped(text.translate(SHOWN))


class Painter:
    """Rows as coloured lines."""

    def __init__(self, tokenizer: Tokenizer, block_size: int):
        self.tokenizer, self.block_size = tokenizer, block_size
        ends = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id}
        self.special = ends | set(tokenizer.hf.all_special_ids)

    def lines(
        self, ids: np.ndarray, mask: np.ndarray, document_ids: np.ndarray | None
    ) -> list[Text]:
        """One line for a row, or one for each of its documents; ids, mask, document_ids: [L]. The
        mask is of what is learnt, which without document ids is all but padding."""
        if document_ids is None:
            return [self.line(ids, mask, mask, 0)]
        real = document_ids > 0
        # padding stays with the document before it
        starts = np.flatnonzero(np.diff(np.maximum.accumulate(document_ids), prepend=0))
        stops = [*starts[1:], len(ids)]
        return [
            Text(f"[document {n}] ", BORDER) + self.line(ids[a:b], real[a:b], mask[a:b], a)
            for n, (a, b) in enumerate(zip(starts, stops, strict=True), 1)
        ]

    def line(self, ids: np.ndarray, real: np.ndarray, scored: np.ndarray, begin: int) -> Text:
        """begin: the place of the first of these tokens in the row. real, scored: which are no
        padding, and which are learnt."""
        text, inside, some = Text(), False, not np.array_equal(real, scored)

        def kind(i: int) -> tuple[int, bool, int, bool]:
            alone = i if real[i] and ids[i] in self.special else -1
            return (begin + i) // self.block_size, bool(real[i]), alone, some and bool(scored[i])

        for (block, is_real, alone, learnt), run in itertools.groupby(range(len(ids)), kind):
            places = list(run)
            if learnt != inside:
                text.append("⟦" if learnt else "⟧", BORDER)
                inside = learnt
            if places[0] and (begin + places[0]) % self.block_size == 0 and self.block_size > 1:
                text.append("│", BORDER)
            if not is_real:
                text.append("▒" * len(places), PADDING)
            else:
                shown = printable(self.tokenizer.decode(ids[places].tolist()))
                text.append(shown, SPECIAL if alone >= 0 else BLOCKS[block % 2])
        return text.append("⟧", BORDER) if inside else text


def counted(tokenizer: Tokenizer, rows: dict[str, np.ndarray]) -> Counter:
    """How much of a batch is text."""
    ends, unknown = (tokenizer.bos_id, tokenizer.eos_id), tokenizer.hf.unk_token_id
    ids, mask = rows["input_ids"], rows["attention_mask"]
    real = ids[rows.get("document_ids", mask) > 0]
    return Counter(
        rows=len(ids),
        places=ids.size,
        tokens=len(real),
        learnt=int(mask.sum()),
        ends=int(np.isin(real, ends).sum()),
        unknown=int((real == unknown).sum()) if unknown not in (None, *ends) else 0,
    )


def rows_line(found: Counter) -> str:
    tokens = found["tokens"]
    unknown = f", {found['unknown'] / tokens:.2%} unknown" if found["unknown"] else ""
    learnt = ""
    if found["learnt"] < tokens:
        learnt = f" {found['learnt'] / tokens:.1%} of them learnt,"
    return (
        f"rows: {found['rows']:,} read with {tokens:,} tokens,{learnt}"
        f" {found['ends'] / tokens:.1%} of them BOS and EOS{unknown};"
        f" {1 - tokens / found['places']:.1%} of the rows is padding"
    )


def documents(split: Split, cache: Path, most: int) -> tuple[list[int], str]:
    """Lengths of the split's first documents without BOS and EOS, until `most` tokens are read; and
    a line about them."""
    (_, pieces), sizes = split.open(cache), [0]
    tokens = size = 0
    while tokens < most and (some := list(itertools.islice(pieces, PIECES_AT_ONCE))):
        for piece, ids in zip(some, split.encode([p.text for p in some]), strict=True):
            tokens += len(ids)
            size += len(piece.text.encode())
            sizes[-1] += len(ids)
            if piece.ends:
                sizes.append(0)
    lengths = sizes[:-1]
    compression = f"{size / max(tokens, 1):.2f} bytes per token"
    if not lengths:
        return [], f"documents: the first has more than {tokens:,} tokens; {compression}"
    return lengths, (
        f"documents: {len(lengths):,} read, of {min(lengths):,} to {max(lengths):,} tokens, median"
        f" {statistics.median_low(lengths):,}; {compression}"
    )


def histogram(lengths: list[int], title: str, target: Path) -> None:
    """Of the lengths in tokens, as a PNG."""
    middle = statistics.median_low(lengths)
    with picture(target, 8, 4.5) as axes:
        axes.hist(lengths, bins=min(60, max(lengths) + 1), color="tab:blue")
        axes.axvline(middle, color="tab:red", label=f"median {middle:,}")
        axes.set(xlabel="tokens of a document", ylabel="documents", title=title)
        axes.grid(True, alpha=0.2)
        axes.legend()


def show_rows(
    config: Config, tokenizer: Tokenizer, data: DataModule, options: argparse.Namespace, say
) -> Counter:
    """Says rows as text; figures of the batches read for them, and of more."""
    data.num_workers = 0  # the first batch is there sooner
    train = options.split == "train"
    source = data.train if train else data.valid
    stream = data.train_dataloader() if train else data.val_dataloader()
    sizes, painters = drawn_sizes(config) if train else None, {}
    found, left = Counter(), options.rows
    for batch in itertools.islice(stream, options.batch, None):
        if "error" in batch:  # where the text is read as it goes (data.streaming)
            raise ValueError(batch["error"])
        rows = {name: value.numpy() for name, value in batch.items() if name != "bookmark"}
        ids, mask = rows["input_ids"], rows["attention_mask"]
        for i in range(min(left, len(ids))):
            row = int(rows["row"][i])
            size = config.block_size if sizes is None else sizes(row)
            say(f"row {row}" if sizes is None else f"row {row}, blocks of {size}", style="bold")
            painter = painters.setdefault(size, Painter(tokenizer, size))
            document_ids = rows["document_ids"][i] if "document_ids" in rows else None
            for line in painter.lines(ids[i], mask[i], document_ids):
                say(line)
            left -= 1
        # a small split comes again and again in training; figures are of each row once
        fresh = len(source) - found["rows"] if isinstance(source, TokenRows) else None
        found += counted(tokenizer, {name: value[:fresh] for name, value in rows.items()})
        once = isinstance(source, TokenRows) and found["rows"] >= len(source)
        if (found["tokens"] >= options.tokens or once) and not left:
            break
    if not found["tokens"]:
        raise ValueError(f"--batch {options.batch}: the split has fewer batches")
    return found


def drawn_sizes(config: Config) -> Callable[[int], int] | None:
    """The place of a row in the stream of training -> the size of its blocks; None: all alike."""
    law, batch = build_sizes(config), config.loader.global_batch_size
    if (schedule := config.training.block_schedule) is not None:
        return lambda row: size_at(schedule, row // batch)
    if law is None:
        return None

    def of_row(row: int) -> int:
        step, place = divmod(row, batch)
        return int(deal(law, config.seed, step, batch, config.model.length, SIZES).sizes[place])

    return of_row


def show(config: Config, options: argparse.Namespace, console: Console) -> None:
    say, tokenizer = partial(console.print, soft_wrap=True), build_tokenizer(config)
    data = build_data(config, tokenizer, train=options.split == "train")
    found = show_rows(config, tokenizer, data, options, say)
    source = data.train if options.split == "train" else data.valid
    title = f"{getattr(config.data, options.split)} ({options.split})"
    if isinstance(source, TokenRows):
        about = source.about
        say(
            f"{title}: {about['documents']:,} documents, {about['tokens']:,} tokens,"
            f" {len(source):,} rows of {source.length} in {source.folder}"
        )
    split = build_split(config, tokenizer, options.split)
    lengths, line = documents(split, build_cache(config).folder, options.tokens)
    say(rows_line(found))
    say(line)
    if options.histogram is not None and lengths:
        histogram(lengths, title, options.histogram)
        say(f"written to {options.histogram}")


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as for main.py")
    parser.add_argument("--split", choices=("train", "valid"), default="train")
    parser.add_argument("--batch", type=int, default=0, help="the first one shown, from 0")
    parser.add_argument("--rows", type=int, default=3, help="shown as text; default 3")
    parser.add_argument("--tokens", type=int, default=200_000, help="for figures; default 200000")
    parser.add_argument("--histogram", type=Path, metavar="FILE.png", help="lengths of documents")
    options = parser.parse_intermixed_args(argv)
    for name in ("batch", "rows", "tokens"):
        if getattr(options, name) < 0:
            parser.error(f"--{name} {getattr(options, name)} must not be negative")
    if (target := options.histogram) is not None:
        if target.suffix != ".png":
            parser.error(f"--histogram {target} must end in .png")
        if not target.absolute().parent.is_dir():
            parser.error(f"--histogram {target}: the folder does not exist")
    config = cli.configure(options.settings)
    quiet()
    console = Console(highlight=False, markup=False, emoji=False)
    return answered("show_batch", lambda: show(config, options, console))


if __name__ == "__main__":
    sys.exit(main())
