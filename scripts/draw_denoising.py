"""Draws how one text came about, from the page that sampling.trajectory wrote.

    python main.py … mode=sample_eval sampling.trajectory=text.html
    python scripts/draw_denoising.py text.html docs/images/denoising.png --block-size 16

Each panel shows the text after one evaluation of the network: black tokens were there before,
orange ones are new, blue ones are the prompt, and each grey box is a token that is still masked.
The boxes of the block at work are darker.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.command import answered, new_parser
from scripts.support.picture import picture
from utils import check_file

COLUMNS, LINES = 46, 10  # of a panel, in characters
START = "<|endoftext|>"  # stands before every text and says nothing
BOX = 3  # characters that a masked token takes
COLOURS = {"given": "#06c", "new": "#d60", "old": "black", "block": "#888", "later": "#ddd"}
MASKED = ("block", "later")


def read(page: Path) -> dict:
    """The record in the page: {"given": [[position, piece], ...], "steps": [the same, ...]}."""
    if page.exists():  # reading names what is not there
        check_file(page)
    text = page.read_text(encoding="utf-8", errors="replace")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    if found is None:
        raise ValueError(f"{page} is not a page of sampling.trajectory")
    return json.loads(found[1])


def panel(record: dict, evaluation: int, tokens: int, block_size: int) -> list[tuple[str, str]]:
    """[(piece, kind of COLOURS)] of the first `tokens` tokens after that evaluation."""
    shown = {i: (piece.removeprefix(START), "given") for i, piece in record["given"]}
    for number, step in enumerate(record["steps"][:evaluation], 1):
        kind = "new" if number == evaluation else "old"
        shown |= {i: (piece, kind) for i, piece in step if piece is not None}
        at_work = step[-1][0] // block_size if step else 0
    masked = {i: ("", "block" if i // block_size == at_work else "later") for i in range(tokens)}
    return [shown.get(i, masked[i]) for i in range(tokens)]


def draw(axes, pieces: list[tuple[str, str]]) -> None:
    """The pieces in lines of COLUMNS characters; a line ends at a piece, not at a word."""
    from matplotlib.patches import Rectangle

    line = column = 0
    for piece, kind in pieces:
        colour, masked = COLOURS[kind], kind in MASKED
        for part in re.findall(r"\n|[^\n]+", piece) or [""]:
            width = BOX if masked else len(part)
            if part == "\n" or column + width > COLUMNS:
                line, column = line + 1, 0
            if part == "\n":
                continue
            if masked:
                axes.add_patch(Rectangle((column + 0.2, line - 0.7), BOX - 0.4, 0.75, color=colour))
            for place, letter in enumerate(part, column):
                axes.text(place, line, letter, family="monospace", color=colour, fontsize=11)
            column += width
    axes.set(xlim=(0, COLUMNS + 2), ylim=(LINES, -1))
    axes.axis("off")


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--block-size", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=64, help="the first N tokens (default 64)")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[6, 22, 38, 61])
    arguments = parser.parse_args()
    return answered("draw_denoising", lambda: draw_all(arguments))


def draw_all(arguments: argparse.Namespace) -> None:
    record = read(arguments.page)
    rows = -(-len(arguments.evaluations) // 2)
    with picture(arguments.out, 10.8, 2.3 * rows, rows=rows, columns=2, dpi=100) as panels:
        for axes in panels.flat:
            axes.axis("off")
        for axes, evaluation in zip(panels.flat, arguments.evaluations, strict=False):
            pieces = panel(record, evaluation, arguments.tokens, arguments.block_size)
            draw(axes, pieces)
            left = sum(kind in MASKED for _, kind in pieces)
            title = f"after evaluation {evaluation}: {left} of {arguments.tokens} tokens masked"
            axes.set_title(title, loc="left", fontsize=9, color="#666")


if __name__ == "__main__":
    sys.exit(main())
