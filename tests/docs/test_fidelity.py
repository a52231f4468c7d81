"""examples/fidelity: each grid trains the settings that its claims name, and a short finding runs to its verdict."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from megatron_tst.analysis.sweep import plan_sweep
from tests.training.runs import ROOT, arguments, start

FOLDER = ROOT / "examples/fidelity"


def load(path: Path):
    """Import a program from its file."""
    spec = importlib.util.spec_from_file_location(f"program_{path.parent.name}_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STUDIES = load(FOLDER / "run.py").STUDIES


def planned(monkeypatch, tmp_path: Path, grid: str, *flags: str):
    sweep = load(ROOT / "tools/sweep.py")
    given = ["--output", str(tmp_path), *grid.split(), "--seeds", "1", "2", "3", *flags]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *given])
    arguments, rest = sweep.parse_arguments()
    return plan_sweep(sweep.read_grid(arguments), tmp_path, rest)


def test_claims_name_trained_settings_and_the_readme_counts_the_runs(monkeypatch, tmp_path: Path):
    config = "--config", str(ROOT / "examples/quickstart/config.yaml")
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (\d+) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(STUDIES)
    for name, count in rows:
        runs = planned(monkeypatch, tmp_path, STUDIES[name].grid, *config)
        assert len(runs) == int(count), name
        settings = {run.name.removesuffix("-seed1") for run in runs}
        for claim in STUDIES[name].claims:
            values = [value for key, value in dataclasses.asdict(claim).items() if key != "text"]
            named = [n for value in values for n in (value if isinstance(value, tuple) else (value,))]
            assert len(named) > 1 and settings.issuperset(named), claim


def fidelity(corpus, tokenizer, tmp_path: Path, *flags: str):
    settings = arguments(corpus, str(tokenizer.path), tmp_path / "unused", "--lr-wsd-decay-iters 2")
    own = "reinitialize", "--seeds", "1", "--output", str(tmp_path / "out")
    return start("examples/fidelity/run.py", *own, *flags, *settings, STEPS="4")


def test_a_finding_is_trained_judged_and_continued(tmp_path: Path, corpus, tokenizer):
    done = fidelity(corpus, tokenizer, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 runs, 3 of them to train, 2 at a time" in done.stdout
    results = tmp_path / "out" / "reinitialize"
    report = (results / "verdict.md").read_text()
    names = ["s4-r0.3", "s4-r0.3-reinitialize_at_switch", "baseline"]
    assert sorted(path.name for path in (tmp_path / "out" / "runs").iterdir() if path.is_dir()) == sorted(
        f"{name}-4steps-seed1" for name in names
    )
    for lower, higher in ((names[0], names[1]), (names[2], names[1])):
        assert re.search(
            rf"\*\*within noise\*\* \({lower} minus {higher}: [+-]0\.\d{{4}} \(1 of at least 3 seeds", report
        )
    assert "![final losses](settings.png)" in report and (results / "settings.png").exists()
    assert report.splitlines()[2] in done.stdout
    again = fidelity(corpus, tokenizer, tmp_path, "--plan")
    assert again.stdout.splitlines() == [
        *(f"{name}-4steps-seed1: finished" for name in (names[2], names[0], names[1])), "3 runs, 0 of them to train"
    ]  # fmt: skip


def test_missing_text_is_reported_in_one_line(tmp_path: Path, tokenizer):
    done = fidelity(tmp_path / "nowhere", tokenizer, tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"run.py: error: --data-path {tmp_path / 'nowhere'}: does not exist")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", STUDIES)
def test_each_finding_is_a_command_of_the_readme(name):
    assert f"python examples/fidelity/run.py {name}" in (FOLDER / "README.md").read_text()
