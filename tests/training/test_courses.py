"""Runs that go back to an earlier checkpoint, and runs that save outside their directory."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.config import UserError
from megatron_tst.telemetry.status import read_status
from tests.training.runs import ROOT, arguments, build_here, train_here

RUN = "--tst-bag-size 4 --tst-steps 4 --train-iters 12 --save-interval 2 --keep-last 2 --eval-iters 0"


@pytest.fixture
def argv(corpus, tokenizer, tmp_path: Path):
    return lambda extra, name="run": arguments(corpus, str(tokenizer.path), tmp_path / name, f"{RUN} {extra}")


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(here, argv, tmp_path, caplog):
    caplog.set_level("INFO", "megatron_tst")
    folders = CheckpointFolders(tmp_path / "run" / "checkpoints")
    train_here(argv(""))
    assert folders.steps() == [4, 8, 10, 12]
    train_here(argv(f"--load {folders.path} --ckpt-step 4 --exit-interval 8"))
    assert folders.steps() == [4, 6, 8]
    assert "later steps [8, 10, 12]" in caplog.text
    replaced = sorted(path.name for path in folders.path.glob("*.replaced"))
    assert replaced == [f"iter_{step:07d}.replaced" for step in (8, 10, 12)]
    # Neither a lost tracker nor a damaged checkpoint leads back to the checkpoints that were set aside.
    folders.tracker.unlink()
    (folders.of(8) / "common.pt").write_bytes(b"")
    run = build_here(argv(f"--load {folders.path}"))
    run.directory.leave()
    assert run.first_step == 6


def test_a_start_without_a_save_does_not_move_later_checkpoints(here, argv, tmp_path):
    folders = CheckpointFolders(tmp_path / "run" / "checkpoints")
    train_here(argv(""))
    build_here(argv(f"--load {folders.path} --ckpt-step 4")).directory.leave()
    assert folders.steps() == [4, 8, 10, 12]


def test_checkpoints_saved_elsewhere_are_found_from_the_run_directory(here, argv, tmp_path):
    """Like a job script: --load names the run directory's checkpoint folder, --save another folder."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    own = f"--load {run / 'checkpoints'} --save {elsewhere}"
    train_here(argv(f"{own} --exit-interval 6"))
    assert (run / "checkpoints").resolve() == elsewhere
    assert CheckpointFolders(elsewhere).steps() == [2, 4, 6]
    assert read_status(run).checkpoint == 6
    environment = {**os.environ, "SLURM_JOB_ID": "7", "RUN_DIR": str(run), "MAX_RESTARTS": "0"}
    done = subprocess.run(
        ["bash", "launch/requeue.sh", "75"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert "starts from step 6 made no progress" in done.stdout
    again = build_here(argv(own))
    again.directory.leave()
    assert again.first_step == 6


def test_saving_to_a_second_folder_is_refused(here, argv, tmp_path):
    """A checkpoint folder that is not empty is not replaced by a link."""
    (tmp_path / "run" / "checkpoints" / "iter_0000002").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot make \S+run/checkpoints a link to this folder: Directory not empty"):
        build_here(argv(f"--save {tmp_path / 'elsewhere'}"))
