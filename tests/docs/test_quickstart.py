"""The README's first command, shortened: the script itself, from the packages' source to the picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tst.telemetry import read_metrics

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


VENV = ROOT / os.environ.get("VENV", ".venv")


@pytest.mark.skipif(not VENV.exists(), reason="run.sh sets up .venv; tests/run.sh does so before the tests")
def test_the_quickstart_runs(tmp_path: Path):
    runs = tmp_path / "runs" / "quickstart-seed3"
    folders = {"DATA": str(tmp_path / "data"), "RUNS": str(tmp_path / "runs")}
    environment = {**os.environ, "STEPS": "40", "PACKAGES": "rich mpmath", **folders}
    command = ["bash", "examples/quickstart/run.sh", "--seed", "3", "--equal-loss"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    baseline, tst = (read_metrics(runs / name / "metrics.jsonl") for name in ("baseline", "tst"))
    assert [line for line in baseline if "loss" in line][-1]["data_tokens"] == 40 * 32 * 128
    assert [line for line in tst if "loss" in line][-1]["data_tokens"] == (12 * 4 + 28) * 32 * 128
    final = [line["valid_loss"] for line in (baseline[-1], tst[-1])]
    assert all(f"{loss:.4f}" in done.stdout for loss in final)
    assert (runs / "loss_curves.png").stat().st_size > 10_000
    gain = final[1] - final[0]
    side = "below" if gain < 0 else "above"
    assert f"TST ended {abs(gain):.4f} nats per token {side} the baseline" in done.stdout
    assert "How far to trust one seed" in done.stdout and "Runs of 40 steps are not those." in done.stdout
    assert (tmp_path / "runs/quickstart-seed3/tst-hf/model.safetensors").exists()
    assert "same most likely token at" in done.stdout
    assert done.stdout.rstrip().rpartition("/tst-hf\n")[2].startswith("def test_")
    assert "Warning" not in done.stdout + done.stderr


def test_unknown_arguments_show_the_usage():
    done = subprocess.run(["bash", "examples/quickstart/run.sh", "--fast"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--equal-loss" in done.stderr


def test_runs_that_are_not_two_methods_are_refused(tmp_path: Path):
    command = [sys.executable, "examples/quickstart/verdict.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"verdict.py: error: {tmp_path}: holds no metrics.jsonl\n"
