"""What a run goes on with, as a checkpoint tells it."""

from checkpointing.layouts import Checkpoint, section
from random_streams import VERSION


def written_here(checkpoint: Checkpoint) -> bool:
    """Whether a run of this project wrote the file; the authors' settings mean other things."""
    return "examples_seen" in section(checkpoint.raw, "sampler")


def streams_version(checkpoint: Checkpoint) -> int:
    """Which version of the random streams the run goes on with: the first did not say so."""
    first = 1 if written_here(checkpoint) else VERSION
    return section(checkpoint.raw, "sampler").get("streams", first)
