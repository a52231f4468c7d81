"""A run that is asked to stop saves, ends with the exit code of a resumable run, and resumes to the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.config import EXIT_RESUMABLE
from tests.checkpoint.test_stock import differing, stored
from tests.distributed.launch import run_distributed
from tests.megatron_lm.trainers import needs_trainer, run_megatron_lm, settings, write
from tests.training.runs import ROOT

STOPPED_AT = 3


def stop_in_a_step(argv: list[str], number: int, signalled_rank: int) -> int:
    """Send one rank a signal in its third step; return the exit code of the program."""
    import pretrain_tst
    from megatron_tst.distributed import enter_device
    from megatron_tst.megatron_patches.cpu import enter_cpu_card

    enter_device()
    enter_cpu_card()
    from megatron_tst.megatron_lm.run import Run

    stepped = Run.stepped

    def signalled(run, step, *args):
        stepped(run, step, *args)
        if step == STOPPED_AT and int(os.environ["RANK"]) == signalled_rank:
            os.kill(os.getpid(), number)

    Run.stepped = signalled
    return pretrain_tst.main_megatron_lm([*argv, "--tst-trainer", "megatron-lm"])


def fill_the_disk(argv: list[str]) -> tuple[str, int]:
    """Let the disk refuse the metrics of the third step on the main rank; return the message for the user."""
    import errno

    from megatron_tst.config import UserError
    from megatron_tst.distributed import enter_device
    from megatron_tst.megatron_lm import train
    from megatron_tst.megatron_patches.cpu import enter_cpu_card
    from megatron_tst.telemetry import MetricsFile

    enter_device()
    enter_cpu_card()
    write_line = MetricsFile.write

    def refused(file, metrics):
        if metrics.step == STOPPED_AT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_line(file, metrics)

    MetricsFile.write = refused
    try:
        train([*argv, "--tst-trainer", "megatron-lm"])
    except UserError as error:
        return str(error), error.exit_code
    return "", 0


@needs_trainer
@pytest.mark.distributed
def test_a_full_disk_under_the_metrics_saves_and_ends_every_rank(argv, tmp_path):
    run = tmp_path / "run"
    one, other = run_distributed(fill_the_disk, 2, [*argv, "--tst-run-dir", str(run)])
    assert one == other
    assert one[0].endswith(
        f"cannot be written: No space left on device; a checkpoint was saved after step {STOPPED_AT}"
    )
    assert one[1] == 2
    assert CheckpointFolders(run / "checkpoints").latest() == STOPPED_AT


def stop_in_the_set_up(argv: list[str], number: int) -> str:
    """Send the rank a signal while it builds its samples; return the message for the user."""
    from megatron_tst.config import StoppedInSetUp
    from megatron_tst.distributed import enter_device
    from megatron_tst.megatron_lm import train
    from megatron_tst.megatron_patches.cpu import enter_cpu_card

    enter_device()
    enter_cpu_card()
    from megatron_tst.megatron_lm import run

    build = run.build_run_data

    def signalled(*args):
        os.kill(os.getpid(), number)
        return build(*args)

    run.build_run_data = signalled
    try:
        train([*argv, "--tst-trainer", "megatron-lm"])
    except StoppedInSetUp as stop:
        return str(stop)
    return ""


@pytest.fixture
def argv(corpus, tokenizer, tmp_path) -> list[str]:
    return ["--config", write(tmp_path / "run.yaml", settings(corpus, str(tokenizer.path)))]


@needs_trainer
@pytest.mark.distributed
@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 2)])
def test_a_signal_in_a_step_saves_and_stops(argv, tmp_path, number, ranks):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    to_stopped = [*argv, "--tst-run-dir", str(stopped)]
    codes = run_distributed(stop_in_a_step, ranks, to_stopped, number, ranks - 1)
    assert codes == [EXIT_RESUMABLE] * ranks
    assert CheckpointFolders(stopped / "checkpoints").steps() == [STOPPED_AT]
    run_megatron_lm([*argv, "--load", str(stopped / "checkpoints")], stopped, ranks)
    run_megatron_lm(argv, whole, ranks)
    assert differing(*(stored(folder / "checkpoints" / "iter_0000008") for folder in (stopped, whole))) == []


@needs_trainer
@pytest.mark.distributed
def test_a_signal_in_the_set_up_stops_the_run_before_the_first_step(argv, tmp_path):
    (said,) = run_distributed(stop_in_the_set_up, 1, [*argv, "--tst-run-dir", str(tmp_path / "run")], signal.SIGTERM)
    assert said == "stopped by SIGTERM before the first step; start the same command again"


@needs_trainer
@pytest.mark.distributed
def test_a_run_ended_by_exit_interval_is_resumable(argv, tmp_path):
    code = (
        "import sys; sys.argv = ['pretrain_tst.py'] + sys.argv[1:]; "
        "import runpy; runpy.run_path('pretrain_tst.py', run_name='__main__')"
    )
    flags = [*argv, "--tst-run-dir", str(tmp_path / "run"), "--tst-trainer", "megatron-lm", "--exit-interval", "5"]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == EXIT_RESUMABLE, done.stderr[-3000:]
    assert CheckpointFolders(tmp_path / "run" / "checkpoints").steps() == [4, 5]


def test_a_missing_trainer_is_reported_in_one_line(tmp_path: Path):
    """The module is hidden, so that any installed megatron-core behaves like 0.16.1."""
    code = (
        "import importlib.util as util, runpy, sys; find = util.find_spec\n"
        "util.find_spec = lambda name, *args: None if name == 'megatron.training' else find(name, *args)\n"
        "sys.argv = ['pretrain_tst.py', '--tst-trainer', 'megatron-lm']\n"
        "runpy.run_path('pretrain_tst.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--tst-trainer megatron-lm: the installed megatron-core" in line
    assert "has no megatron.training" in line


@needs_trainer
@pytest.mark.distributed
def test_a_run_with_preflight_trains_to_the_end(argv, tmp_path):
    lines = run_megatron_lm([*argv, "--preflight"], tmp_path / "run", 2)
    assert lines[-1]["step"] == 8
