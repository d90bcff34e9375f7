"""Put a checkpoint in parts together: one file in the published Lightning layout.

    python scripts/consolidate.py FOLDER FILE

FOLDER: what a run with checkpointing.format=sharded has written, such as checkpoints/last.ckpt.
FILE is, key for key, what checkpointing.format=file would have written. This needs memory for all
of it: 16 bytes for each parameter where there is an average.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpointing import sharded, sharded_index, torch_file
from checkpointing.restricted_pickle import CheckpointError
from scripts.support.command import answered, new_parser


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="a checkpoint in parts")
    parser.add_argument("file", metavar="FILE", help="to be written")
    options = parser.parse_args(arguments)
    return answered("consolidate", lambda: run(options.folder, options.file))


def run(folder: str, file: str) -> None:
    """CheckpointError where FOLDER cannot be read, ValueError where FILE exists."""
    if os.path.lexists(file):
        raise ValueError(f"{file} exists: delete it, or give another name")
    if "://" in file:
        raise ValueError(f"{file} is no path: write a local file, and upload that")
    if "://" in folder:
        raise ValueError(f"{folder} is no path: download the folder, and give its place on a disk")
    if not sharded_index.is_in_parts(folder):
        what = "is no checkpoint in parts" if os.path.lexists(folder) else "does not exist"
        raise CheckpointError(f"{folder} {what} (a folder with {sharded_index.NAME})")
    torch_file.save(sharded.read(folder), file)
    print(f"{file}: {Path(file).stat().st_size:,} bytes, as checkpointing.format=file writes it")


if __name__ == "__main__":
    sys.exit(main())
