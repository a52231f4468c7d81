"""A disk that fills up, at each place where a run writes: a checkpoint is saved if possible, and the exit code is 2."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_tst.checkpoint.save import CheckpointSaver
from megatron_tst.config import UserError
from megatron_tst.telemetry import read_metrics
from megatron_tst.training.step import Stepper
from tests.training.runs import ROOT, arguments, build_here, parameters, train_here

RUN = "--tst-bag-size 4 --tst-steps 4"
LONGER = "--train-iters 24"
FULL = "No space left on device"


@pytest.fixture
def argv(corpus, tokenizer, tmp_path: Path):
    def build(run: Path, extra: str = "") -> list[str]:
        return arguments(corpus, str(tokenizer.path), run, f"{RUN} {extra}")

    return build


def fill(disk: Path) -> None:
    """Fill the disk up to its last byte."""
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match=FULL):
        while True:
            file.write(bytes(1 << 14))


def fill_before(monkeypatch, owner, name: str, disk: Path, call: int = 1, is_here=lambda: True) -> None:
    """Fill a disk right before the given call of a function, on the ranks that ``is_here`` selects."""
    function, calls = getattr(owner, name), []

    def filled(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and is_here():
            fill(disk)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, filled)


@pytest.mark.parametrize("left", [0, 1 << 14])
def test_a_full_cache_disk_is_named_and_no_partial_file_stays(here, argv, small_disk: Path, tmp_path: Path, left):
    """With no byte left, the first file cannot be written; with a few bytes left, an index cannot be written."""
    fill(small_disk)
    os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - left)
    cache = small_disk / "cache"
    with pytest.raises(UserError, match=rf"^--data-cache-path {cache}: cannot be written: {FULL}$"):
        build_here(argv(tmp_path / "run", f"--data-cache-path {cache} --train-iters 2000"))
    assert not list(small_disk.rglob("*.partial-*"))
    assert not (tmp_path / "run").exists()


def test_a_start_that_cannot_write_keeps_the_settings_of_the_run(here, argv, small_disk: Path, tmp_path: Path):
    run, elsewhere = small_disk / "run", f"--data-cache-path {tmp_path / 'cache'} --save {tmp_path / 'saved'}"
    train_here(argv(run, f"{elsewhere} --train-iters 6"))
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    fill(small_disk)
    with pytest.raises(UserError, match=rf"^--tst-run-dir {run}: cannot be written: {FULL}$"):
        build_here(argv(run, f"{elsewhere} --load {tmp_path / 'saved'}"))
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_log_that_cannot_be_written_is_reported_once(here, argv, tmp_path: Path, capfd):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.txt").symlink_to("/dev/full")
    train_here(argv(run))
    screen = capfd.readouterr().err
    assert screen.count(f"WARNING: {run / 'log.txt'} cannot be written: [Errno 28] {FULL}") == 1
    assert "Traceback" not in screen and "Logging error" not in screen
    assert "step 8/8" in screen


@pytest.mark.parametrize("saving", ["", "--async-save"])
def test_a_checkpoint_is_saved_if_metrics_cannot_be_written(
    here, argv, small_disk: Path, tmp_path: Path, monkeypatch, capfd, saving
):
    run, saved = small_disk / "run", tmp_path / "saved"
    elsewhere = f"--data-cache-path {tmp_path / 'cache'} --save {saved} {saving} {LONGER}"
    whole = train_here(argv(tmp_path / "whole", LONGER))
    with monkeypatch.context() as patches:
        fill_before(patches, Stepper, "train", small_disk, call=6)
        saved_line = r"a checkpoint was saved after step (\d+), continue with"
        told = rf"^--tst-run-dir: {run / 'metrics.jsonl'} cannot be written: {FULL}; {saved_line}"
        with pytest.raises(UserError, match=rf"{told} --load {saved}$") as failed:
            train_here(argv(run, elsewhere))
    # The rest of the file's last page still takes one or more lines.
    stopped = int(re.search(told, str(failed.value))[1])
    assert 6 <= stopped < 16
    screen = capfd.readouterr().err
    assert "Traceback" not in screen and "Logging error" not in screen
    assert run.joinpath("metrics.jsonl").read_text().endswith("}\n")
    (small_disk / "filler").unlink()
    resumed = train_here(argv(run, f"{elsewhere} --load {saved}"))
    assert resumed.first_step == stopped
    assert all((parameters(resumed)[name] == value).all() for name, value in parameters(whole).items())
    # Only the line that was refused is missing.
    steps = [line["step"] for line in read_metrics(resumed.directory.metrics) if "loss" in line]
    assert steps == [step for step in range(1, 25) if step != stopped]


def test_the_previous_checkpoint_is_kept_if_the_next_does_not_fit(here, argv, small_disk: Path, monkeypatch):
    run = small_disk / "run"
    with monkeypatch.context() as patches:
        fill_before(patches, Stepper, "train", small_disk, call=6)
        with pytest.raises(UserError, match=rf"^--save: .*iter_\d+.* cannot be written: .*{FULL}"):
            train_here(argv(run))
    (small_disk / "filler").unlink()
    resumed = build_here(argv(run, f"--load {run / 'checkpoints'}"))
    assert resumed.first_step == 4
    resumed.directory.leave()


def test_a_full_disk_during_publication_leaves_no_checkpoint(here, argv, small_disk: Path, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patches:
        fill_before(patches, CheckpointSaver, "publish", small_disk)
        with pytest.raises(UserError, match=rf"^--save: {small_disk}/.* cannot be written: {FULL}$"):
            train_here(argv(tmp_path / "run", f"--save {small_disk / 'saved'}"))
    assert list((small_disk / "saved").iterdir()) == []


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_continues_without_tensorboard(here, argv, small_disk: Path, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    fill_before(monkeypatch, Stepper, "train", small_disk, call=2)
    run = train_here(argv(tmp_path / "run", f"--tensorboard-dir {small_disk / 'events'}"))
    screen = capfd.readouterr().err
    assert "the run continues without it" in screen and "TensorBoard missed" in screen
    assert "Traceback" not in screen
    assert len(read_metrics(run.directory.metrics)) > 8


def test_a_run_that_fills_its_disk_exits_with_2_and_a_line(argv, small_disk: Path, tmp_path: Path):
    """The run's metrics fill the rest of the disk."""
    run = small_disk / "run"
    run.mkdir()
    fill(small_disk)
    os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - (1 << 16))
    elsewhere = f"--data-cache-path {tmp_path / 'cache'} --save {tmp_path / 'saved'} --train-iters 500"
    done = subprocess.run(
        [sys.executable, "pretrain_tst.py", *argv(run, elsewhere)],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    saved_line = r"a checkpoint was saved after step (\d+), continue with --load"
    found = re.search(rf"metrics.jsonl cannot be written: {FULL}; {saved_line}", last)
    assert done.returncode == 2 and found, done.stderr
    assert "Traceback" not in done.stderr
    state = json.loads((tmp_path / "saved" / f"iter_{int(found[1]):07d}" / "run_state.json").read_text())
    assert state["iteration"] == int(found[1]) < 500


def test_the_exit_code_is_2_even_if_the_line_cannot_be_written(argv, tmp_path: Path):
    """This happens if standard error goes to a file on the full disk."""
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "pretrain_tst.py", *argv(tmp_path / "run", "--split 0,0,0")]
        assert subprocess.run(command, cwd=ROOT, stderr=full, timeout=900).returncode == 2
