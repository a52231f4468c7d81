"""A small grid trained for real, gone on with, and drawn."""

import csv
import json
from pathlib import Path

from tests.locks import held_by_another
from tests.training.runs import arguments, start


def sweep(tmp_path: Path, corpus, tokenizer, *flags):
    # Without its own run directory: each run of the grid gets one.
    settings = arguments(corpus, str(tokenizer.path), tmp_path / "unused")
    grid = "--bag-sizes 2 --step-ratios 0.5 --seeds 1 2 --workers 2".split()
    return start("tools/sweep.py", "--output", str(tmp_path / "out"), *grid, *settings, *flags)


def test_a_grid_is_trained_once_and_drawn(corpus, tokenizer, tmp_path: Path):
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
    assert (tmp_path / "out" / "u_curves.png").read_bytes().startswith(b"\x89PNG")
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


def test_a_run_that_is_not_evaluated_is_named_and_the_others_are_run(tmp_path: Path, corpus, tokenizer):
    done = sweep(tmp_path, corpus, tokenizer, "--split", "100,0,0")
    assert done.returncode == 1
    assert done.stderr.count("did not end: ") == 4
    assert "has no logged step or no evaluation yet" in done.stderr


def test_a_second_grid_in_the_same_folder_is_refused(tmp_path: Path, corpus, tokenizer):
    (tmp_path / "out").mkdir()
    with held_by_another(tmp_path / "out" / "sweep.lock"):
        done = sweep(tmp_path, corpus, tokenizer, "--train-iters", "12")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--output {tmp_path / 'out'}: another process is writing it (sweep.lock is locked)" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sweep.lock"]


def test_a_mistake_is_one_line(tmp_path: Path, corpus, tokenizer):
    done = sweep(tmp_path, corpus, tokenizer, "--lr", "-1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("sweep.py: error: --lr")
    assert not (tmp_path / "out").exists()
