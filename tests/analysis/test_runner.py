"""Processes of a grid: their outcomes, their GPUs and their interruption."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tst.analysis.runner import NOT_STARTED, Runner
from tests.analysis.test_sweep import planned

PROGRAM = """
import os, sys, pathlib, signal
name = sys.argv[len(sys.argv) - sys.argv[::-1].index("--tst-run-dir")]
pathlib.Path(name + ".env").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
if "s4" in name:
    signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(name + ".stopped").write_text(""), os._exit(75)))
    pathlib.Path(name + ".begun").write_text("")
    signal.pause()
print("the last word of", name)
sys.exit(2 if "mistake" in name else 3 if "s2" in name else 0)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_a_failed_run_is_reported_with_its_last_line(tmp_path: Path, program):
    runs = planned(tmp_path, sizes=(2,), ratios=(0.25, 0.5), seeds=(1,))
    ends = {run.name: failure for run, failure in Runner(program, 2, []).run_all(runs)}
    assert ends["baseline-seed1"] is None
    for name in ("s2-r0.25-seed1", "s2-r0.5-seed1"):
        assert ends[name] == f"exit code 3: the last word of {tmp_path / name} ({tmp_path / name}.out)"


def test_a_users_mistake_stops_the_grid(tmp_path: Path, program):
    runs = planned(tmp_path / "mistake", sizes=(2, 4), ratios=(0.25, 0.5), seeds=(1,))
    (tmp_path / "mistake").mkdir()
    first, *others = [failure for _, failure in Runner(program, 1, []).run_all(runs)]
    assert first.startswith("exit code 2: the last word")
    assert others == [NOT_STARTED] * 4


def test_each_run_has_its_own_gpu(tmp_path: Path, program):
    runs = planned(tmp_path, sizes=(2,), ratios=(0.25, 0.5), seeds=(1, 2))
    list(Runner(program, 2, ["4", "GPU-7"]).run_all(runs))
    seen = {path.read_text() for path in tmp_path.glob("*.env")}
    assert seen == {"4", "GPU-7"}
    list(Runner(program, 1, []).run_all(runs[:1]))
    assert (tmp_path / "baseline-seed1.env").read_text() in ("none", "")


def test_an_interruption_stops_running_runs_and_starts_none(tmp_path: Path, program):
    """The generator is closed after the baseline has ended, while s4 is running and s8 is waiting to start."""
    runs = planned(tmp_path, sizes=(4, 8), ratios=(0.5,), seeds=(1,))
    begun = tmp_path / "s4-r0.5-seed1.begun"
    ends = Runner(program, 1, []).run_all(runs)
    assert next(ends)[0].name == "baseline-seed1"
    for _ in range(1000):
        if begun.exists():
            break
        subprocess.run([sys.executable, "-c", ""], check=True)
    ends.close()
    assert (tmp_path / "s4-r0.5-seed1.stopped").exists()
    assert not (tmp_path / "s8-r0.5-seed1.env").exists()
