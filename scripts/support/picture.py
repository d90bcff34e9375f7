"""Pictures as files: no display is needed, and a picture appears whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import atomic_file


@contextmanager
def picture(
    target: Path, width: float, height: float, *, rows: int = 1, columns: int = 1, dpi: int = 120
) -> Iterator:
    """`with picture(…) as axes:` draws on matplotlib's Axes, an array of them if there is more
    than one; then `target` is written as a PNG. Sizes in inches. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "the package matplotlib is not installed: pip install matplotlib"
        ) from error

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure.subplots(rows, columns)
    with atomic_file(target, "wb") as file:
        figure.savefig(file, format="png", dpi=dpi)
