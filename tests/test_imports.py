"""Imports run one way: commands -> training, decoding, evaluation -> models, tasks, data -> the
floor; and what needs no accelerator imports no jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "radonc_jax"
COMMANDS = {
    "train",
    "evaluate",
    "predict",
    "prepare",
    "synthesize",
    "initialize",
    "compare",
    "review",
    "export",
}
# A module may import modules of lower levels, and those of its own folder.
LEVELS = {
    "command": 0,
    "compiler": 0,
    "parallel": 0,
    "tracking": 0,
    "tasks": 1,
    "data": 2,
    "models": 2,
    "training": 3,
    "decoding": 3,
    "evaluation": 3,
    "settings": 4,
    "loading": 5,
    "answering": 5,
    "exporting": 6,
    "notebook": 6,
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield path, ".".join(parts).removesuffix(".__init__")


def imported(path):
    """Names of radonc_jax modules (or of names in packages) that a file imports, anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("radonc_jax."):
                yield name.removeprefix("radonc_jax.")


def room(name):
    return name.split(".")[0]


def test_imports_go_downwards():
    wrong = []
    for path, name in modules():
        if name in ("__init__", "") or room(name) in COMMANDS:
            continue
        for target in imported(path):
            if room(target) == room(name):
                continue
            if room(target) in COMMANDS or LEVELS[room(target)] >= LEVELS[room(name)]:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_every_module_has_a_place():
    for _, name in modules():
        assert name in ("__init__", "") or room(name) in COMMANDS | set(LEVELS)


@pytest.mark.parametrize(
    "names",
    [
        ["radonc_jax"],
        ["radonc_jax.data.batches", "radonc_jax.data.cohort", "radonc_jax.data.synthetic"],
        ["radonc_jax.prepare", "radonc_jax.data.annotation", "radonc_jax.data.table1"],
        ["radonc_jax.tasks", "radonc_jax.evaluation.metrics", "radonc_jax.evaluation.statistics"],
    ],
    ids=str,
)
def test_needs_no_jax(names):
    code = f"import sys, {', '.join(names)}; sys.exit('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent)
    assert result.returncode == 0
