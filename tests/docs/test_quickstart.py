"""The README's first command, shortened: the whole script, from the packages' source to the plot."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest

from megatron_tst.telemetry import read_metrics

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


VENV = ROOT / os.environ.get("VENV", ".venv")


@pytest.mark.skipif(not VENV.exists(), reason="run.sh sets up .venv; tests/run.sh does so before the tests")
def test_the_quickstart_runs(tmp_path: Path):
    runs = tmp_path / "runs" / "quickstart-seed3"
    folders = {"DATA": str(tmp_path / "data"), "RUNS": str(tmp_path / "runs")}
    environment = {**os.environ, "STEPS": "50", "PACKAGES": "rich mpmath", **folders}
    command = ["bash", "examples/quickstart/run.sh", "--seed", "3", "--equal-loss"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    baseline, tst = (read_metrics(runs / name / "metrics.jsonl") for name in ("baseline", "tst"))
    assert [line for line in baseline if "loss" in line][-1]["data_tokens"] == 50 * 32 * 128
    assert [line for line in tst if "loss" in line][-1]["data_tokens"] == (15 * 4 + 35) * 32 * 128
    final = [line["valid_loss"] for line in (baseline[-1], tst[-1])]
    assert all(f"{loss:.4f}" in done.stdout for loss in final)
    assert (runs / "loss_curves.png").stat().st_size > 10_000
    gain = final[1] - final[0]
    side = "below" if gain < 0 else "above"
    assert f"TST ended {abs(gain):.4f} nats per token {side} the baseline" in done.stdout
    assert "Reliability of one seed" in done.stdout and "does not apply to runs of 50 steps." in done.stdout
    assert (tmp_path / "runs/quickstart-seed3/tst-hf/model.safetensors").exists()
    assert "same most likely token at" in done.stdout
    assert done.stdout.rstrip().rpartition("/tst-hf\n")[2].startswith("def test_")
    assert "Warning" not in done.stdout + done.stderr


def test_unknown_arguments_show_the_usage():
    done = subprocess.run(["bash", "examples/quickstart/run.sh", "--fast"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--equal-loss" in done.stderr


def test_the_verdict_needs_runs_of_exactly_two_methods(tmp_path: Path):
    command = [sys.executable, "examples/quickstart/verdict.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"verdict.py: error: {tmp_path}: holds no metrics.jsonl\n"


def test_the_table_of_seeds_matches_the_measured_seeds():
    """The README's rows, mean and standard error match seeds.csv."""
    losses: dict[str, dict[int, float]] = {"baseline": {}, "tst": {}}
    with (QUICKSTART / "seeds.csv").open() as file:
        for row in csv.DictReader(file):
            if row["steps"] == "4500":
                losses[row["method"]][int(row["seed"])] = float(row["final_loss"])
    text = (QUICKSTART / "README.md").read_text()
    gaps = [losses["tst"][seed] - loss for seed, loss in losses["baseline"].items()]
    assert len(gaps) == 5 and max(gaps) < 0
    for (seed, loss), gap in zip(losses["baseline"].items(), gaps, strict=True):
        assert f"| {seed} | {loss:.4f} | {losses['tst'][seed]:.4f} | {gap:.4f} |" in text
    means = [fmean(losses[name].values()) for name in ("baseline", "tst")]
    error = stdev(gaps) / 5**0.5
    assert f"| mean | {means[0]:.4f} | {means[1]:.4f} | {fmean(gaps):.4f} ± {error:.4f} |" in text
    assert f"the mean gain is {fmean(gaps) / -error:.0f} times its standard error" in text
