"""Reading a YAML or JSON file never executes anything that it contains."""

import ast
from pathlib import Path

import pytest
import yaml

import megatron_tst
from megatron_tst.analysis.curves import read_curve
from megatron_tst.checkpoint.run_state import read_saved_config
from megatron_tst.config import UserError, load_config, parse_config
from megatron_tst.telemetry.status import read_status

ROOT = Path(megatron_tst.__file__).parents[1]
SOURCES = sorted(
    path for folder in ("megatron_tst", "tools", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
)
METRICS = (
    '{"kind": "step", "step": 1, "phase": 0, "loss": 1.0, "step_time_s": 1.0, "bag_size": 1, "loss_kind": "ce"}\n'
    '{"kind": "valid", "step": 1, "valid_loss": 1.0}\n'
)
# Functions that read settings from a YAML file, given its directory.
READERS = {
    "--config": lambda folder: parse_config(["--config", str(folder / "config.yaml")]),
    "a run's settings": lambda folder: load_config(folder / "config.yaml"),
    "a checkpoint's settings": read_saved_config,
    "run_status": read_status,
    "compare_runs": read_curve,
}
# Functions and classes of the standard library and PyYAML that build objects or run code from text.
RUNS_CODE = {
    "eval",
    "exec",
    "unsafe_load",
    "full_load",
    "unsafe_load_all",
    "full_load_all",
    "UnsafeLoader",
    "FullLoader",
}


@pytest.mark.parametrize("reader", READERS)
def test_yaml_file_builds_no_objects(tmp_path, reader):
    (tmp_path / "config.yaml").write_text(
        f"model:\n  num_layers: !!python/object/apply:os.mkdir [{tmp_path}/witness]\n"
    )
    (tmp_path / "metrics.jsonl").write_text(METRICS)
    with pytest.raises(UserError, match=r"config.yaml.*python/object/apply:os.mkdir"):
        READERS[reader](tmp_path)
    assert not (tmp_path / "witness").exists()


def test_unsafe_loader_executes_the_same_file(tmp_path):
    """Negative control: the file above runs code when an unsafe loader reads it."""
    yaml.unsafe_load(f"!!python/object/apply:os.mkdir [{tmp_path}/witness]")
    assert (tmp_path / "witness").exists()


def code_runners(source: str) -> list[str]:
    """Return the names of calls that could run code from a file, and of YAML loads without a safe loader."""
    tree, found = ast.parse(source), []
    safe = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "SafeLoader" in [ast.unparse(base).split(".")[-1] for base in node.bases]
    } | {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        loaders = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "Loader"]
        is_unsafe_yaml = name in ("yaml.load", "yaml.load_all") and not set(loaders) & safe
        if name in RUNS_CODE or (name.startswith("yaml.") and name.split(".")[1] in RUNS_CODE) or is_unsafe_yaml:
            found.append(name)
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_has_no_call_that_runs_code_from_files(source: Path):
    assert code_runners(source.read_text(encoding="utf-8")) == []


def test_check_finds_calls_that_run_code():
    assert code_runners("yaml.load(text)\nyaml.load(text, Loader=yaml.FullLoader)\neval(text)") == [
        "yaml.load", "yaml.load", "eval",
    ]  # fmt: skip
    assert code_runners("yaml.unsafe_load(text)") == ["yaml.unsafe_load"]
    assert code_runners("class L(yaml.SafeLoader): pass\nyaml.load(t, Loader=L)\nyaml.safe_load(t)\nmodel.eval()") == []
