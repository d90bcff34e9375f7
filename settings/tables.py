"""The tables of the code, read from its source: what a setting may name.

The code keeps one table for each kind of choice: a literal dict at the top level of a module, one
line per entry. It is read here with `ast`. Importing the module instead would import torch, which
takes seconds; a wrong command line is answered before that.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


@cache
def _module(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def table(file: str, name: str) -> dict[str, dict]:
    """{entry: its literal keyword arguments} of the dict `name` in `file`, in the order there.

    file: a path from the root of the project. A keyword whose value is no literal is left out, and
    an entry that is no call has none. ValueError where there is no such literal dict.
    """
    for node in _module(file).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            if not isinstance(node.value, ast.Dict):
                break
            names = [ast.literal_eval(key) for key in node.value.keys if key is not None]
            if len(names) < len(node.value.keys):
                break
            return dict(zip(names, map(_keywords, node.value.values), strict=True))
    raise ValueError(f"{file}: {name} must be a literal dict at the top level of the file")


def _keywords(entry: ast.expr) -> dict:
    found = {}
    for keyword in entry.keywords if isinstance(entry, ast.Call) else ():
        try:
            found[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            continue  # a function or another object
    return found


def _fields(file: str, name: str) -> Iterator[ast.AnnAssign]:
    """The annotated fields of the class `name` in `file`."""
    (found,) = (n for n in _module(file).body if isinstance(n, ast.ClassDef) and n.name == name)
    return (field for field in found.body if isinstance(field, ast.AnnAssign))


def class_defaults(file: str, name: str) -> dict:
    """{field: its literal default} of the class `name` in `file`."""
    return {
        field.target.id: ast.literal_eval(field.value)
        for field in _fields(file, name)
        if isinstance(field.value, ast.Constant)
    }


def step_numbers() -> dict[str, dict]:
    """{field: its type, default, limit and doc} of the numbers of step rules: sampling.NAME."""
    return {
        field.target.id: {"type": ast.unparse(field.annotation)} | _keywords(field.value)
        for field in _fields("samplers/params.py", "SamplingParams")
        if isinstance(field.value, ast.Call) and ast.unparse(field.value.func) == "rule_number"
    }


def _with_first(name: str, found: dict) -> dict:
    return {key: found[key] for key in sorted(found, key=lambda key: key != name)}


def modes() -> dict[str, str]:
    """{mode: what it does}, train first: the files of modes/ that define prepare(config), and the
    first line of each."""
    found = {}
    for path in sorted((ROOT / "modes").glob("*.py")):
        module = _module(f"modes/{path.name}")
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "prepare" for node in module.body
        ):
            line = ast.get_docstring(module).splitlines()[0]
            found[path.stem] = line.removeprefix(f"mode={path.stem}: ").rstrip(".")
    return _with_first("train", found)


@cache
def algorithms() -> dict[str, dict]:
    """{algorithm: all literal fields of its entry}, bamdlm first: algo.name. Each file of
    objectives/ may have a table ALGORITHMS."""
    defaults = class_defaults("objectives/algorithms.py", "Algorithm")
    found = {}
    for path in sorted((ROOT / "objectives").glob("*.py")):
        if "\nALGORITHMS = {" in path.read_text(encoding="utf-8"):
            entries = table(f"objectives/{path.name}", "ALGORITHMS")
            found |= {name: defaults | keywords for name, keywords in entries.items()}
    return _with_first("bamdlm", found)


def schedules() -> dict[str, dict]:
    """The noise schedules: noise.type."""
    return table("noise_schedule.py", "SCHEDULES")


def lr_schedules() -> dict[str, dict]:
    """lr_scheduler.name."""
    return table("utils.py", "LR_SCHEDULES")


def step_rules() -> dict[str, dict]:
    """Which tokens a step of the sampler reveals: sampling.steps."""
    return table("samplers/steps.py", "STEPS")


def confidences() -> dict[str, dict]:
    """How sure the network is of a position: sampling.confidence."""
    return table("samplers/steps.py", "CONFIDENCES")


def likelihoods() -> dict[str, dict]:
    """eval.likelihood, before a colon and a number."""
    return table("evaluation/table.py", "LIKELIHOODS")


def attention_backends() -> dict[str, dict]:
    """{backend: all literal fields of its entry}: model.attn_backend, beside auto."""
    defaults = class_defaults("models/attention.py", "Backend")
    entries = table("models/attention.py", "BACKENDS")
    return {name: defaults | keywords for name, keywords in entries.items()}


def logged_figures() -> dict[str, dict]:
    """What a run logs: the names in metrics.csv."""
    return table("training/logged.py", "LOGGED")


def known_corpora() -> dict[str, dict]:
    """The named corpora: data.train and data.valid."""
    return table("data/corpora.py", "CORPORA")
