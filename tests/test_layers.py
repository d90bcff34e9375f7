"""Who may import whom, read from the import statements; and what importing must not do.

    main
    build
    diffusion   dataloader   generation   checkpoint_io
    objectives  samplers  metrics  generative  checkpoints  corpora  tokenizer
    models      noise_schedule  config  utils

A module imports only from the layers below its own. Modules that stand in no layer (parts that were
split off) are looked through: what they import counts as imported by whoever imports them.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"main"},
    {"build"},
    {"diffusion", "dataloader", "generation", "checkpoint_io"},
    {
        "objectives",
        "samplers",
        "metrics",
        "generative",
        "checkpoints",
        "corpora",
        "tokenizer",
    },
    {"models", "noise_schedule", "config", "utils"},
]
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
PACKAGES = ("models", "objectives", "samplers", "config")
# the module, the data module, what resumes them, and build with the parts split off from it
WITH_LIGHTNING = {
    "diffusion",
    "dataloader",
    "checkpoint_io",
    "build",
    "fitting",
    "modes",
    "progress",
    "run_log",
    "health",
    "saving",
    "sharding",
    "throughput",
    "training_state",
}
OPTIONAL_IN_MODELS = {
    "hf.py": {"transformers"},
    "attention.py": {"flash_attn"},
    "decode.py": {"triton"},
}
MAY_MEET_PICKLES = {"unpickling", "torch_zip", "ssd_model"}  # the last names their error only


def sources():
    """{module: its files}: the top-level modules and the packages of the framework."""
    found = {path.stem: [path] for path in sorted(ROOT.glob("*.py"))}
    found |= {name: sorted((ROOT / name).rglob("*.py")) for name in PACKAGES}
    return found


SOURCES = sources()
FILES = [path for paths in SOURCES.values() for path in paths]
# Programs beside the framework; scripts/hub_files/ lies in exports.
BESIDE = [path for name in ("ssd-lm", "scripts") for path in sorted((ROOT / name).rglob("*.py"))]


def parse(path):
    return ast.parse(path.read_text(), filename=str(path))


def imported(path):
    """The top-level names of all modules that a file imports, also inside functions; relative
    imports are "."."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


IMPORTS = {
    name: set().union(*(imported(path) for path in paths)) - {name, "."}
    for name, paths in SOURCES.items()
}


def of_the_project(name):
    return IMPORTS[name] & SOURCES.keys()


def reached(name):
    """The modules of the table that `name` imports, directly or through modules in no layer."""
    found, open_ends, seen = set(), [name], set()
    while open_ends:
        for other in of_the_project(open_ends.pop()) - seen:
            seen.add(other)
            (found.add if other in DEPTH else open_ends.append)(other)
    return found


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("name", sorted(DEPTH))
def test_a_layer_imports_only_from_the_layers_below(name):
    assert name in SOURCES, f"{name} is in the table of layers and not in the project"
    wrong = {other for other in reached(name) if DEPTH[other] <= DEPTH[name]}
    assert not wrong, f"{name} must not reach {sorted(wrong)}"


def test_no_module_imports_itself_through_others():
    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        for other in of_the_project(name):
            visit(other, [*path, name])

    for name in SOURCES:
        visit(name, [])


@pytest.mark.parametrize("path", SOURCES["models"], ids=relative)
def test_models_import_nothing_outside_themselves(path):
    """Exporting the network is copying the folder."""
    allowed = {".", "torch", "einops"} | sys.stdlib_module_names
    allowed |= OPTIONAL_IN_MODELS.get(path.name, set())
    assert imported(path) <= allowed


def test_lightning_is_imported_only_where_the_crank_is_turned():
    users = {
        name for name, imports in IMPORTS.items() if imports & {"lightning", "pytorch_lightning"}
    }
    assert users <= WITH_LIGHTNING


def test_samplers_and_objectives_know_no_configuration():
    for name in ("objectives", "samplers", "models", "noise_schedule", "metrics"):
        assert not IMPORTS[name] & {"config", "hydra", "omegaconf", "tokenizer", "transformers"} - (
            {"transformers"} if name == "models" else set()
        )


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_importing_a_module_only_defines_names(path):
    """At module level stand a docstring, imports, definitions and constants; nothing is called for
    its effect, no foreign attribute or environment variable is set. A package that may be missing
    is tried, and what needs it defined if it is there."""
    tried = set()
    for node in parse(path).body:
        where = f"{relative(path)}:{node.lineno}"
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{where} does something at import"
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for part in ast.walk(target):
                    assert not isinstance(part, ast.Attribute | ast.Subscript), where
        elif isinstance(node, ast.If):
            test = ast.unparse(node.test)
            if test in {f"{name} is not None" for name in tried}:
                assert all(isinstance(part, ast.FunctionDef) for part in node.body), where
            else:
                assert test in ("__name__ == '__main__'", "TYPE_CHECKING"), where
        elif isinstance(node, ast.Try):
            assert all(isinstance(part, ast.Import) for part in node.body), where
            tried |= {alias.name for part in node.body for alias in part.names}
        else:
            definitions = (
                ast.Import,
                ast.ImportFrom,
                ast.FunctionDef,
                ast.AsyncFunctionDef,
                ast.ClassDef,
                ast.AnnAssign,
            )
            assert isinstance(node, definitions), where


@pytest.mark.parametrize("path", [*FILES, *BESIDE], ids=relative)
def test_house_rules_of_a_file(path):
    """No bare except, no device by name, no evaluated text, no remote code, no sniffing of
    settings, no pickle but the restricted one."""
    for node in ast.walk(parse(path)):
        where = f"{relative(path)}:{getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"
        if isinstance(node, ast.keyword):
            remote = node.arg == "trust_remote_code" and ast.unparse(node.value) != "False"
            assert not remote, f"{where}: remote code"
            if node.arg == "weights_only":
                assert ast.unparse(node.value) == "True", f"{where}: unrestricted pickle"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            text = [x.value for x in given if isinstance(x, ast.Constant)]
            assert not any(str(x).startswith("cuda") for x in text), f"{where}: device by name"
            assert called not in ("eval", "exec"), f"{where}: evaluated text"
            asks_whether = called == "hasattr" or (called == "getattr" and len(given) == 3)
            if asks_whether:
                subject = ast.unparse(given[0])
                ours = subject.startswith(("config", "self.config", "settings"))
                assert not ours, f"{where}: sniffing of settings"
    if path.stem not in MAY_MEET_PICKLES:
        assert not imported(path) & {"pickle", "dill", "cloudpickle"}, relative(path)


def test_the_command_line_is_checked_before_anything_heavy_is_imported():
    heavy = ["torch", "lightning", "transformers", "datasets"]
    code = f"import sys, main, cli, config; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
