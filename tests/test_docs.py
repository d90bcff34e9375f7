"""The pages for readers: links, paths, settings and commands in them exist."""

import json
import re
import shlex
from pathlib import Path
from string import Template

import pytest
import yaml

from settings.keys import SCHEMA, groups
from settings.multirun import expand
from settings.overrides import parse

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *ROOT.glob("docs/**/*.md"),
    ROOT / "ssd-lm/README.md",
]
# what a command makes, and what is named as an example
MADE = ("outputs/", "logs/", "sample_logs/", "watch_folder/", "checkpoints/", "rows/", "my_", "/")
TO_BE_WRITTEN = {"extending.md"}  # names files that its reader adds; its own test applies them
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
SUFFIXES = (".py", ".sh", ".md", ".yaml", ".cff", ".toml")
FILES = (".ckpt", ".safetensors", ".bin", ".csv", ".json")
SHELL = re.compile(r"(?:^ {4,}[^\n]*\n)+|^```.*?^```", re.M | re.S)


def name(path):
    return str(path.relative_to(ROOT))


def prose(page):
    return SHELL.sub("", page.read_text())


def spans(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_resolves(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in TO_BE_WRITTEN], ids=name)
def test_every_path_in_backticks_exists(page):
    top = {path.name for path in ROOT.iterdir()}
    for span in spans(page):
        if not PATH.fullmatch(span) or span.startswith(MADE) or "NAME" in span:
            continue
        if (span.partition("/")[0] in top and "/" in span) or span.endswith(SUFFIXES):
            assert (ROOT / span).exists() or (page.parent / span).exists(), span


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in TO_BE_WRITTEN], ids=name)
def test_every_program_of_a_command_exists(page):
    for block in SHELL.findall(page.read_text()):
        for path in re.findall(r"(?:python|bash|sbatch) ((?:[\w-]+/)*[\w-]+\.(?:py|sh))", block):
            assert (ROOT / path).is_file(), path


def commands(page):
    """The arguments of every call of main.py, as a shell would pass them, those of -m for each of
    its jobs; … is left out."""
    variables = {}
    for block in SHELL.findall(page.read_text()):
        variables |= re.findall(r'^ *([A-Z]+)="(.*?)"', block, re.M | re.S)
        for line in re.sub(r"\\\n", " ", block).splitlines():
            if "main.py" in line and "$@" not in line and "--help" not in line:
                line = Template(line.partition("main.py")[2]).substitute(variables)
                arguments = shlex.split(line, comments=True)
                words = [word for word in arguments if "=" in word and "…" not in word]
                yield from (
                    (job.words for job in expand(words).jobs) if "-m" in arguments else [words]
                )


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in TO_BE_WRITTEN], ids=name)
def test_commands_give_settings_values_that_they_may_have(page):
    for arguments in commands(page):
        assert parse(arguments).problems == [], arguments


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in TO_BE_WRITTEN], ids=name)
def test_every_setting_in_backticks_is_one(page):
    """`a.b` without a value only where `a` is a section."""
    known = SCHEMA.keys() | set(groups())
    sections = {key.partition(".")[0] for key in SCHEMA if "." in key}
    for word in " ".join(span for span in spans(page) if "(" not in span).split():
        if word.endswith(FILES):
            continue
        given = re.match(r"([a-z_]+(?:\.[A-Za-z_]+)*)=(?!=)", word)
        if given and given[1] != "name":
            assert given[1] in known, word
        elif re.fullmatch(r"[a-z_]+(\.[A-Za-z_]+)+", word) and word.partition(".")[0] in sections:
            assert word in known, word


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_the_index_names_every_page():
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("**/*.md"):
        if name(page) != "docs/README.md":
            assert f"({page.relative_to(ROOT / 'docs')})" in index, name(page)


def test_the_pull_request_template_has_five_lines_at_most():
    assert len((ROOT / ".github/pull_request_template.md").read_text().splitlines()) <= 5


def test_the_licence_is_the_one_that_is_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
    paper = citation["preferred-citation"]
    assert paper["title"] in (ROOT / "README.md").read_text()
    assert all(author["family-names"] for author in paper["authors"])


def test_hooks_download_nothing_and_run_the_pinned_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = hooks["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert "-m ruff" in hook["entry"]


def test_figures_of_the_learning_check_are_those_of_its_files():
    page = (ROOT / "docs/results.md").read_text()
    for path in (ROOT / "docs/results").glob("*.ppl.json"):
        found = json.loads(path.read_text())
        assert f"{found['ppl']:.2f} ± {found['ppl_error']:.2f}" in page, path.name
