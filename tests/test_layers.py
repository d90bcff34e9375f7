"""Who may import whom, read from the import statements; what importing must not do; where files
lie.

    main         writer
    modes
    diffusion    dataloader
    training     sampling
    evaluation
    checkpointing
    objectives
    data
    samplers     random_streams
    models       noise_schedule       settings
    utils

A folder or a module of the root imports only from the lines below its own. Two of one line know
nothing of each other.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"main", "writer"},
    {"modes"},
    {"diffusion", "dataloader"},
    {"training", "sampling"},
    {"evaluation"},
    {"checkpointing"},
    {"objectives"},
    {"data"},
    {"samplers", "random_streams"},
    {"models", "noise_schedule", "settings"},
    {"utils"},
]
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
# programs and tests beside the framework; they may import all of it
BESIDE = {"benchmarks", "docs", "scripts", "ssd-lm", "tests"}
MOST_FILES = {"python at the root": 8, "at the root": 24, "in a folder": 20}
WITH_LIGHTNING = {"main", "modes", "diffusion", "dataloader", "training"}
KERNELS = (
    "block_diffusion",
    "block_diffusion_gradients",
    "block_diffusion_steps",
    "count_p",
    "cross_entropy",
    "decode",
    "few_rows",
    "heads",
    "mlp",
    "residual",
    "residual_steps",
    "split",
    "starting",
    "top_p",
)
OPTIONAL_IN_MODELS = {
    "hf.py": {"transformers"},
    "attention.py": {"flash_attn"},
    **{f"{name}.py": {"triton"} for name in KERNELS},
}
MAY_MEET_PICKLES = {"bounded_pickle", "restricted_pickle", "ssd_model"}  # the last: its errors


def tracked():
    """The files of the repository that exist, as paths from its root."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


TRACKED = tracked()
SOURCES = {  # {a folder or a module of the root: its files}
    name: [
        ROOT / p
        for p in TRACKED
        if p.suffix == ".py" and (p.parts[0], p.stem)[len(p.parts) == 1] == name
    ]
    for name in sorted(
        {(p.parts[0], p.stem)[len(p.parts) == 1] for p in TRACKED if p.suffix == ".py"} - BESIDE
    )
}
FILES = [path for paths in SOURCES.values() for path in paths]
PROGRAMS = [ROOT / p for p in TRACKED if p.suffix == ".py" and p.parts[0] in ("ssd-lm", "scripts")]


@cache
def parse(path):
    return ast.parse(path.read_text(), filename=str(path))


@cache
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


@cache
def imported_by(name):
    """The same of all files of a folder, without itself."""
    return set().union(*(imported(path) for path in SOURCES[name])) - {name, "."}


@cache
def relative(path):
    return str(path.relative_to(ROOT))


def test_the_root_is_small():
    files = [path for path in TRACKED if len(path.parts) == 1]
    assert len(files) <= MOST_FILES["at the root"], sorted(map(str, files))
    python = [path for path in files if path.suffix == ".py"]
    assert len(python) <= MOST_FILES["python at the root"], sorted(map(str, python))


def test_no_folder_is_crowded():
    """Every file of a folder with Python counts; of tests/, where recordings lie, Python alone."""
    sources = {path.parent for path in TRACKED if path.suffix == ".py"}
    count = {}
    for path in TRACKED:
        counts = path.suffix == ".py" or path.parts[0] != "tests"
        if len(path.parts) > 1 and path.parent in sources and counts:
            count[path.parent] = count.get(path.parent, 0) + 1
    crowded = {str(k): n for k, n in count.items() if n > MOST_FILES["in a folder"]}
    assert not crowded


def test_every_source_is_in_a_layer():
    assert SOURCES.keys() == DEPTH.keys()


@pytest.mark.parametrize("name", sorted(DEPTH))
def test_a_layer_imports_only_from_the_layers_below(name):
    wrong = {other for other in imported_by(name) & DEPTH.keys() if DEPTH[other] <= DEPTH[name]}
    assert not wrong, f"{name} must not import {sorted(wrong)}"


def test_no_file_imports_itself_through_others():
    """Files of one folder; between folders the layers see to it."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}

    def asked(name):
        package = name if modules[name].stem == "__init__" else name.rpartition(".")[0]
        for node in parse(modules[name]).body:
            if isinstance(node, ast.ImportFrom):
                base = f"{package}.{node.module or ''}".strip(".") if node.level else node.module
                yield from (f"{base}.{alias.name}" for alias in node.names)
                yield base
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)

    graph = {name: {other for other in asked(name) if other in modules} for name in modules}
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in graph[name] - {name}:
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("path", SOURCES["models"], ids=relative)
def test_models_import_nothing_outside_themselves(path):
    """Exporting the network is copying the folder."""
    allowed = {".", "torch", "einops"} | sys.stdlib_module_names
    allowed |= OPTIONAL_IN_MODELS.get(path.name, set())
    assert imported(path) <= allowed


def test_a_package_only_hands_on_names():
    for path in FILES:
        if path.name == "__init__.py":
            kinds = {type(node) for node in parse(path).body}
            assert kinds <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign}, relative(path)


def test_lightning_is_imported_only_where_training_is_driven():
    users = {name for name in SOURCES if imported_by(name) & {"lightning", "pytorch_lightning"}}
    assert users <= WITH_LIGHTNING


def test_samplers_and_objectives_know_no_configuration():
    for name in ("data", "objectives", "samplers", "models", "noise_schedule", "evaluation"):
        assert not imported_by(name) & {"settings", "hydra", "omegaconf"}
    for name in ("objectives", "samplers", "noise_schedule"):
        assert not imported_by(name) & {"data", "transformers"}


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


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=relative)
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
    code = (
        "import sys, main, settings; from modes import cli, multirun;"
        f" print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_what_few_need_is_imported_when_it_is_asked_for():
    """The compiler, and half a second ahead of every export, inspection and notebook: what
    checkpoints in parts need."""
    rare = ["torch.distributed.checkpoint", "torch._dynamo"]
    code = (
        "import sys, checkpointing.layouts, main, models.dit, samplers.writing;"
        f" print([m for m in {rare} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
