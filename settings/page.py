"""docs/settings.md, made from the schema: `python -m settings.page` writes it."""

from pathlib import Path

from settings.help import defaults, described
from settings.keys import choices, groups
from settings.tables import logged_figures, modes

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """\
# Settings

This page lists every setting of `python main.py` with its default and its meaning, to look one up.
`python main.py --help` prints the same. The page is made by `python -m settings.page`: change
`settings/sections/` or `configs/`, and run that command again.

A setting is typed as `name=value`. `null` stands for a value that is chosen when the run starts.
"""


def page() -> str:
    lines = [HEAD, "## Modes", ""]
    lines += [f"- `mode={name}`: {line}" for name, line in modes().items()]
    lines += ["", "## Groups", "", "A group sets several settings at once: `algo=mdlm`.", ""]
    lines += [f"- `{group}=` " + ", ".join(f"`{c}`" for c in choices(group)) for group in groups()]
    section = None
    for key, value in defaults().items():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines += ["", f"## {section or 'The run'}", ""]
            lines += ["| Setting | Default | Meaning |", "|---|---|---|"]
        lines.append(f"| `{key}` | `{value}` | {described(key)} |")
    lines += ["", "## Figures that a run logs", ""]
    lines += ["| Name in `metrics.csv` | Meaning |", "|---|---|"]
    lines += [f"| `{name}` | {entry['doc']}. |" for name, entry in logged_figures().items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
