"""Imports between the packages point in one direction, and every module imports with only the base dependencies."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_tst"
_BASE = {"config", "superposition"}
_RANKS = {*_BASE, "shape", "megatron_patches", "distributed"}
ROOMS = {
    "config": {"superposition"},
    "superposition": set(),
    "shape": {"config"},
    "megatron_patches": _BASE,
    "distributed": {*_BASE, "megatron_patches"},
    "model": _RANKS,
    "data": _RANKS,
    "telemetry": _RANKS,
    "checkpoint": _RANKS,
    "training": {*_RANKS, "model", "data", "telemetry", "checkpoint", "preflight"},
    "megatron_lm": {*_RANKS, "model", "data", "telemetry", "checkpoint", "preflight"},
    "conversion": {*_RANKS, "checkpoint"},
    "analysis": {*_BASE, "shape", "telemetry"},
    "planning": {"config", "shape", "telemetry"},
}
LIBRARIES = {
    "wandb": "telemetry", "tensorboard": "telemetry", "matplotlib": "analysis", "tyro": "config",
    "transformers": "conversion", "safetensors": "conversion",
}  # fmt: skip
_TRAINER = ("megatron_lm", False)
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(source: str) -> list[str]:
    nodes = ast.walk(ast.parse(source))
    found = [[alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
             for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    return [name for names in found for name in names]


def trespasses(room: str, source: str) -> list[str]:
    wrong = []
    for name in imports(source):
        parts = name.split(".")
        if parts[0] == "megatron_tst" and len(parts) > 1 and parts[1] not in {room, *ROOMS[room]}:
            wrong.append(name)
        if LIBRARIES.get(parts[0], room) != room:
            wrong.append(name)
        if name.startswith("megatron.training") and room != "megatron_lm":
            wrong.append(name)
        if room == "superposition" and parts[0] not in {"torch", "megatron_tst", *sys.stdlib_module_names}:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m.parent != PACKAGE], ids=lambda m: str(m.relative_to(PACKAGE))
)
def test_imports_point_in_one_direction(module: Path):
    assert trespasses(module.relative_to(PACKAGE).parts[0], module.read_text()) == []


def test_a_forbidden_import_is_found():
    assert trespasses("data", "from megatron_tst.training import train\nimport tyro") == [
        "megatron_tst.training",
        "tyro",
    ]
    assert trespasses("superposition", "import numpy") == ["numpy"]
    assert trespasses("training", "from megatron.training import training") == ["megatron.training"]


def test_every_module_imports_with_only_the_base_dependencies():
    # Those of the room beside __init__.py ask for a card when they are imported.
    modules = [m for m in MODULES if m.name != "plots.py" and (m.parent.name, m.name == "__init__.py") != _TRAINER]
    names = [".".join(m.relative_to(ROOT).with_suffix("").parts) for m in modules]
    optional = ["matplotlib", "transformers", "safetensors", "wandb", "transformer_engine", "apex"]
    code = (
        "import sys, importlib\n"
        f"for name in {optional}: sys.modules[name] = None\n"
        f"for name in {names}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(module: Path):
    source = module.read_text()
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
