"""The tables of the code, read from its source: what a setting may name.

The code keeps one table for each kind of choice: a literal dict at the top level of a module, one
line per entry. It is read here with `ast`. Importing the module instead would import torch, which
takes seconds; a wrong command line is answered before that.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
NUMBERS = ("rule_number", "number")  # of samplers/params.py: what a field of a setting is made with


def _source(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@cache
def table(file: str, name: str) -> dict[str, dict]:
    """{entry: its literal keyword arguments} of the dict `name` in `file`, in the order there.

    file: a path from the root of the project. A keyword whose value is no literal is left out, and
    an entry that is a dict is its own; another that is no call has none. ValueError where there is
    no such literal dict.
    """
    found = re.search(rf"^{name} = (\{{\n(?s:.*?)^\}}|\{{.*\}}$)", _source(file), re.M)
    entries = ast.parse(found[1], mode="eval").body if found else None
    if not isinstance(entries, ast.Dict) or None in entries.keys:  # None: ** of another dict
        raise ValueError(f"{file}: {name} must be a literal dict at the top level of the file")
    names = map(ast.literal_eval, entries.keys)
    return dict(zip(names, map(_keywords, entries.values), strict=True))


@cache
def built_with(file: str, name: str, kind: str) -> set[str]:
    """The entries of the dict `name` in `file` whose source text uses `kind`, itself or through
    functions of the file."""
    tree = ast.parse(_source(file))
    functions = {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef)}
    assigned = (each for each in tree.body if isinstance(each, ast.Assign))
    entries = next(each.value for each in assigned if ast.unparse(each.targets[0]) == name)

    def uses(node: ast.AST) -> bool:
        names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        return kind in names or any(uses(functions[each]) for each in names & functions.keys())

    pairs = zip(entries.keys, entries.values, strict=True)
    return {ast.literal_eval(key) for key, entry in pairs if uses(entry)}


def _keywords(entry: ast.expr) -> dict:
    if isinstance(entry, ast.Dict):
        return ast.literal_eval(entry)
    found = {}
    for keyword in entry.keywords if isinstance(entry, ast.Call) else ():
        try:
            found[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            continue  # a function or another object
    return found


def _fields(file: str, name: str) -> Iterator[ast.AnnAssign]:
    """The annotated fields of the class `name` in `file`."""
    found = re.search(rf"^class {name}\b.*\n(?:(?: .*)?\n)*", _source(file), re.M)
    (body,) = ast.parse(found[0]).body
    return (field for field in body.body if isinstance(field, ast.AnnAssign))


def class_defaults(file: str, name: str) -> dict:
    """{field: its literal default} of the class `name` in `file`."""
    return {
        field.target.id: ast.literal_eval(field.value)
        for field in _fields(file, name)
        if isinstance(field.value, ast.Constant)
    }


def sampling_fields() -> list[str]:
    """The names of the fields of SamplingParams."""
    return [field.target.id for field in _fields("samplers/params.py", "SamplingParams")]


def step_numbers() -> dict[str, dict]:
    """{field: its type, default, limit and doc} of what rule_number and number make:
    sampling.NAME."""
    return {
        field.target.id: {"type": ast.unparse(field.annotation)} | _keywords(field.value)
        for field in _fields("samplers/params.py", "SamplingParams")
        if isinstance(field.value, ast.Call) and ast.unparse(field.value.func) in NUMBERS
    }


@cache
def modes() -> dict[str, str]:
    """{mode: what it does}, train first: the files of modes/ that define prepare(config), and the
    first line of each."""
    found = {}
    for path in sorted((ROOT / "modes").glob("*.py")):
        text = _source(f"modes/{path.name}")
        if "\ndef prepare(" in text:
            line = text.partition("\n")[0].strip('"')
            found[path.stem] = line.removeprefix(f"mode={path.stem}: ").rstrip(".")
    return {"train": found.pop("train"), **found}


@cache
def algorithms() -> dict[str, dict]:
    """{algorithm: all literal fields of its entry, and what its sampler can}, bamdlm first:
    algo.name. Each file of objectives/ may have a table ALGORITHMS."""
    samplers = table("samplers/writing.py", "SAMPLERS")
    defaults = class_defaults("objectives/algorithms.py", "Algorithm")
    found = {}
    for path in sorted((ROOT / "objectives").glob("*.py")):
        if "\nALGORITHMS = {" in path.read_text(encoding="utf-8"):
            entries = table(f"objectives/{path.name}", "ALGORITHMS")
            found |= {name: defaults | keywords for name, keywords in entries.items()}
    for name, entry in found.items():
        if entry.get("writes") not in samplers:
            raise ValueError(
                f"objectives/: writes of {name} must be one of {', '.join(samplers)},"
                f" got {entry.get('writes')!r}"
            )
        entry["can"] = samplers[entry["writes"]].get("can", ())
    return {"bamdlm": found.pop("bamdlm"), **found}


def names_with(field: str) -> str:
    """The algorithms whose entry says that they have it, as words."""
    return " and ".join(name for name, entry in algorithms().items() if entry[field])


def attention_backends() -> dict[str, dict]:
    """{backend: all literal fields of its entry}: model.attn_backend, beside auto."""
    defaults = class_defaults("models/attention.py", "Backend")
    entries = table("models/attention.py", "BACKENDS")
    return {name: defaults | keywords for name, keywords in entries.items()}


schedules = partial(table, "noise_schedule.py", "SCHEDULES")  # noise.type
lr_schedules = partial(table, "training/lr_schedules.py", "LR_SCHEDULES")  # lr_scheduler.name
sampling_ranges = partial(table, "samplers/params.py", "RANGES")  # limit: its comparisons
step_rules = partial(table, "samplers/steps.py", "STEPS")  # sampling.steps
confidences = partial(table, "samplers/steps.py", "CONFIDENCES")  # sampling.confidence
known_corpora = partial(table, "data/corpora.py", "CORPORA")  # data.train, data.valid
corpora_on_the_hub = partial(built_with, "data/corpora.py", "CORPORA", "Hub")  # have a revision
# eval.likelihood, before a colon and a number
likelihoods = partial(table, "evaluation/table.py", "LIKELIHOODS")
logged_figures = partial(table, "training/logged.py", "LOGGED")  # the names in metrics.csv
gpus = partial(table, "training/flops.py", "GPUS")  # plan.gpu
chat_names = partial(table, "data/chat/records.py", "NAMES")  # the keys of data.chat_fields
# model.activation_checkpointing
activation_checkpointing = partial(table, "models/recomputing.py", "ACTIVATION_CHECKPOINTING")
