"""Draw the block-diffusion mask over [x_t ; x0], and what each backend computes of it.

    python scripts/show_mask.py --length 64 --block-size 8 --out mask.png

Left: who sees whom (rows ask, columns answer). Beside it the pairs that a backend hands to its
kernel: seen pairs dark, computed for nothing light. sdpa: chunks of queries with their keys; flex:
tiles of 128 x 128 that are not empty (--tile draws other sizes).

    python scripts/show_mask.py --length 64 --block-size 8 --documents 20 8 30

The same where a row holds documents of these lengths (data.pack=documents), each from a block on.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.attention import CHUNK_TOKENS, dense_mask
from models.masks import BlockDiffusion
from scripts.support.command import answered, new_parser
from scripts.support.picture import picture

LONGEST = 4096  # a picture of 8192 x 8192 pairs


def document_ids_of(documents: list[int], length: int, block_size: int) -> torch.Tensor | None:
    """[1, 2L] of [x_t ; x0] for documents of these lengths; None: one text. ValueError if they do
    not fit."""
    if not documents:
        return None
    row = torch.zeros(1, length, dtype=torch.int64)
    begin = 0
    for number, tokens in enumerate(documents, 1):
        if tokens < 1 or begin + tokens > length:
            raise ValueError(
                f"--documents: {tokens} tokens do not fit from place {begin} of a row of {length}"
            )
        row[:, begin : begin + tokens] = number
        begin += -(-tokens // block_size) * block_size
    return torch.cat([row, row], 1)


def seen_pairs(
    length: int, block_size: int, document_ids: torch.Tensor | None = None
) -> torch.Tensor:
    index = torch.arange(2 * length)
    mask = dense_mask(BlockDiffusion(block_size), index, index, 2 * length, document_ids)
    return mask if document_ids is None else mask[0, 0]


def sdpa_pairs(length: int, block_size: int) -> torch.Tensor:
    """What the split form computes: a chunk of x_t with itself, a chunk of either half with all of
    x0 up to its end."""
    chunk = torch.arange(length) // (block_size * max(1, CHUNK_TOKENS // block_size))
    asked = chunk[:, None]
    return torch.cat([asked == chunk, asked >= chunk], 1).repeat(2, 1)


def flex_pairs(seen: torch.Tensor, tile: int) -> torch.Tensor:
    """Tiles with at least one pair."""
    more = -len(seen) % tile
    full = torch.nn.functional.pad(seen, (0, more, 0, more))
    tiles = full.unflatten(0, (-1, tile)).unflatten(2, (-1, tile)).any(3).any(1)
    return torch.kron(tiles, torch.ones(tile, tile, dtype=torch.bool))[: len(seen), : len(seen)]


def draw(
    length: int, block_size: int, tile: int, path: Path, document_ids: torch.Tensor | None
) -> dict[str, float]:
    """Writes the picture; the share of the dense (2L)^2 that each form computes."""
    seen = seen_pairs(length, block_size, document_ids)
    computed = {
        "seen": seen,
        "dense": torch.ones_like(seen),
        "sdpa": sdpa_pairs(length, block_size),
        "flex": flex_pairs(seen, tile),
    }
    shares = {name: float(pairs.float().mean()) for name, pairs in computed.items()}
    ticks = ([length // 2, length + length // 2], ["x_t", "x0"])
    with picture(path, 4 * len(computed), 4.4, columns=len(computed)) as axes:
        for axis, (name, pairs) in zip(axes, computed.items(), strict=True):
            axis.imshow(pairs.float() + seen.float(), cmap="Greys", vmin=0, vmax=2)
            axis.axhline(length - 0.5, color="tab:red", linewidth=0.8)
            axis.axvline(length - 0.5, color="tab:red", linewidth=0.8)
            axis.set_title(f"{name}: {shares[name]:.1%} of (2L)²")
            axis.set_xticks(*ticks)
            axis.set_yticks(*ticks)
        axes[0].figure.suptitle(f"L = {length}, S = {block_size}")
    return shares


def main(argv=None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--documents", type=int, nargs="+", default=[], metavar="TOKENS")
    parser.add_argument("--out", type=Path, default=Path("mask.png"))
    args = parser.parse_args(argv)
    for name in ("length", "block_size", "tile"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.length % args.block_size:
        parser.error(f"--block-size {args.block_size} does not divide --length {args.length}")
    if args.length > LONGEST:
        parser.error(f"--length {args.length} is more than a picture holds; at most {LONGEST}")
    if args.out.suffix != ".png":
        parser.error(f"--out {args.out} must end in .png")
    try:
        document_ids = document_ids_of(args.documents, args.length, args.block_size)
    except ValueError as error:
        parser.error(str(error))
    return answered("show_mask", lambda: show(args, document_ids))


def show(args: argparse.Namespace, document_ids) -> None:
    shares = draw(args.length, args.block_size, args.tile, args.out, document_ids)
    for name, share in shares.items():
        print(f"{name:<6}{share:8.2%} of the dense (2L)^2")
    print(f"written to {args.out}")


if __name__ == "__main__":
    sys.exit(main())
