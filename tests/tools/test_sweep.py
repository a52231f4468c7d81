"""A small grid that is trained, continued and drawn."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.locks import held_by_another
from tests.training.runs import ROOT, arguments, start

GRID = "--bag-sizes 2 --step-ratios 0.5 --seeds 1 2"


def sweep(tmp_path: Path, corpus, tokenizer, *flags, grid: str = GRID):
    # The flags name no run directory, because each run of the grid gets its own.
    settings = arguments(corpus, str(tokenizer.path), tmp_path / "unused")
    workers = ("--workers", "2")
    return start("tools/sweep.py", "--output", str(tmp_path / "out"), *grid.split(), *workers, *settings, *flags)


def test_a_grid_is_trained_only_once_and_drawn(corpus, tokenizer, tmp_path: Path):
    done = sweep(tmp_path, corpus, tokenizer)
    assert done.returncode == 0, done.stderr
    assert "4 runs, 4 of them to train, 2 at a time" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [(row["bag_size"], row["step_ratio"], row["seed"]) for row in rows] == [
        ("1", "0.0", "1"), ("1", "0.0", "2"), ("2", "0.5", "1"), ("2", "0.5", "2")
    ]  # fmt: skip
    for row, name in zip(rows, ("baseline-seed1", "baseline-seed2", "s2-r0.5-seed1", "s2-r0.5-seed2"), strict=True):
        lines = [json.loads(line) for line in (tmp_path / "out" / name / "metrics.jsonl").open()]
        assert float(row["final_loss"]) == round(lines[-1]["valid_loss"], 4)
    assert len({row["final_loss"] for row in rows}) == 4
    gaps = [float(rows[n]["final_loss"]) - float(rows[n - 2]["final_loss"]) for n in (2, 3)]
    assert [row["less_baseline"] for row in rows[:2]] == ["", ""]
    assert [float(row["less_baseline"]) for row in rows[2:]] == [pytest.approx(gap, abs=1e-4) for gap in gaps]
    (base, bags) = csv.DictReader((tmp_path / "out" / "sweep_means.csv").open())
    assert (base["seeds"], base["pairs"], base["less_baseline"]) == ("2", "0", "")
    assert (bags["seeds"], bags["pairs"]) == ("2", "2")
    assert float(bags["less_baseline"]) == pytest.approx(sum(gaps) / 2, abs=1e-4)
    assert float(bags["less_baseline_error"]) == pytest.approx(abs(gaps[0] - gaps[1]) / 2, abs=1e-4)
    # A single bag size and step ratio do not make a curve.
    assert (tmp_path / "out" / "settings.png").read_bytes().startswith(b"\x89PNG")
    metrics = (tmp_path / "out" / "baseline-seed1" / "metrics.jsonl").read_bytes()
    again = sweep(tmp_path, corpus, tokenizer)
    assert "4 runs, 0 of them to train" in again.stdout
    assert (tmp_path / "out" / "baseline-seed1" / "metrics.jsonl").read_bytes() == metrics
    other = sweep(tmp_path, corpus, tokenizer, "--lr", "2e-2")
    assert other.returncode == 2
    assert "baseline-seed1: holds a run with other settings; choose another --output" in other.stderr
    drawn = start("tools/sweep.py", "--output", str(tmp_path / "drawn"), "--draw",
                  *map(str, sorted((tmp_path / "out").glob("*seed1"))))  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    assert len((tmp_path / "drawn" / "sweep.csv").read_text().splitlines()) == 3


def test_vary_takes_any_setting_and_results_names_the_folder(tmp_path: Path, corpus, tokenizer):
    """A second grid in the same folder reuses the runs that both grids contain, and writes its own tables."""
    grid = "--phases 2:0.5 --vary tst-reinitialize-at-switch false true --seeds 1 --results"
    done = sweep(tmp_path, corpus, tokenizer, grid=f"{grid} {tmp_path / 'results'}")
    assert done.returncode == 0, done.stderr
    assert "3 runs, 3 of them to train" in done.stdout
    names = ["baseline-seed1", "s2-r0.5-reinitialize_at_switch-seed1", "s2-r0.5-seed1"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == names
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "settings.png", "sweep.csv", "sweep_means.csv"
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "results" / "sweep.csv").open()))
    found = [(row["bag_size"], row["step_ratio"], row["reinitialize at switch"], row["run"]) for row in rows]
    assert found == [("1", "0.0", "", names[0]), ("2", "0.5", "False", names[2]), ("2", "0.5", "True", names[1])]
    again = sweep(tmp_path, corpus, tokenizer, grid="--bag-sizes 2 --step-ratios 0.5 --seeds 1")
    assert "2 runs, 0 of them to train" in again.stdout


def test_a_stopped_sweep_stops_its_runs_and_can_be_continued(tmp_path: Path, corpus, tokenizer):
    settings = arguments(
        corpus, str(tokenizer.path), tmp_path / "unused", "--train-iters 100000 --eval-interval 100000"
    )
    command = [sys.executable, "tools/sweep.py", "--output", str(tmp_path / "out"), *GRID.split(), *settings]
    log = tmp_path / "out" / "baseline-seed1" / "metrics.jsonl"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for _ in range(1000):
            if process.poll() is not None or (log.exists() and log.stat().st_size):
                break
            subprocess.run([sys.executable, "-c", ""], check=True)
        process.terminate()
        told, _ = process.communicate(timeout=900)
    assert process.returncode == 130, told
    assert "stopped; the same command continues the sweep" in told
    # The run received the signal too, and saved a checkpoint.
    assert (tmp_path / "out" / "baseline-seed1" / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


def test_a_run_that_fails_is_named_and_the_others_are_trained(tmp_path: Path, corpus, tokenizer):
    done = sweep(tmp_path, corpus, tokenizer, "--split", "100,0,0")
    assert done.returncode == 1
    assert done.stderr.count("did not finish: ") == 4
    assert "has no logged step or no evaluation yet" in done.stderr


def test_a_second_grid_in_the_same_folder_is_refused(tmp_path: Path, corpus, tokenizer):
    (tmp_path / "out").mkdir()
    with held_by_another(tmp_path / "out" / "sweep.lock"):
        done = sweep(tmp_path, corpus, tokenizer, "--train-iters", "12")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--output {tmp_path / 'out'}: another process is writing it (sweep.lock is locked)" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sweep.lock"]


def test_a_mistake_prints_one_line(tmp_path: Path, corpus, tokenizer):
    done = sweep(tmp_path, corpus, tokenizer, "--lr", "-1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("sweep.py: error: --lr")
    assert not (tmp_path / "out").exists()
