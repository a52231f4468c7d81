"""The README's first command, shortened: the script itself, from the standard library's source to the picture."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_tst.telemetry import read_metrics

ROOT = Path(__file__).parents[2]


VENV = ROOT / os.environ.get("VENV", ".venv")


@pytest.mark.skipif(not VENV.exists(), reason="run.sh sets up .venv; tests/run.sh does so before the tests")
def test_the_quickstart_runs(tmp_path: Path):
    runs = tmp_path / "runs"
    environment = {**os.environ, "STEPS": "40", "DATA": str(tmp_path / "data"), "RUNS": str(runs)}
    command = ["bash", "examples/quickstart/run.sh", "--seed", "3", "--equal-loss"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    baseline, tst = (read_metrics(runs / name / "metrics.jsonl") for name in ("baseline", "tst"))
    assert [line for line in baseline if "loss" in line][-1]["data_tokens"] == 40 * 32 * 128
    assert [line for line in tst if "loss" in line][-1]["data_tokens"] == (12 * 2 + 28) * 32 * 128
    final = [line["valid_loss"] for line in (baseline[-1], tst[-1])]
    assert all(f"{loss:.4f}" in done.stdout for loss in final)
    assert (runs / "loss_curves.png").stat().st_size > 10_000
    assert "speed-up" in done.stdout
    assert (runs / "hf" / "model.safetensors").exists()
    assert "same most likely token at" in done.stdout
    assert done.stdout.rstrip().rpartition("/hf\n")[2].startswith("def test_")
    assert "Warning" not in done.stdout + done.stderr


def test_unknown_arguments_show_the_usage():
    done = subprocess.run(["bash", "examples/quickstart/run.sh", "--fast"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--equal-loss" in done.stderr
