"""A run that receives a stop signal, at any moment and from any launcher, saves once and exits with 75."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_tst.checkpoint.save import CheckpointSaver
from megatron_tst.config import EXIT_RESUMABLE, StoppedInSetUp, parse_config
from megatron_tst.data import samples
from megatron_tst.distributed.signals import STOP_SIGNALS, StopSignals
from megatron_tst.telemetry import read_metrics, run_directory
from megatron_tst.training import build_run, loop, train
from megatron_tst.training.step import Stepper
from tests.training.runs import ROOT, arguments, build_here, train_here

RUN = "--tst-bag-size 4 --tst-steps 4"
LONG = "--train-iters 2000 --eval-iters 0 --num-workers 1"
TIMEOUT_S = 900


@pytest.fixture
def argv(corpus, tokenizer, tmp_path: Path):
    def build(extra: str = "") -> list[str]:
        return arguments(corpus, str(tokenizer.path), tmp_path / "run", f"{RUN} {extra}")

    return build


@pytest.fixture
def signals():
    """The stop signals of this process, with its handlers restored after the test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop = StopSignals()
    stop.listen()
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("iter_*"))


def half_written(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial*"))


def signal_within(monkeypatch, owner, name: str) -> None:
    """Send this process both signals, one right after the other, whenever it calls the function."""
    function = getattr(owner, name)

    def signalled(*args, **kwargs):
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)


# The function to signal in, and the save interval, which is also the step after which that function is first called.
MOMENTS = {
    "a step": (Stepper, "train", 1),
    "an evaluation": (loop, "evaluate", 4),
    "a save": (CheckpointSaver, "publish", 3),
}


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("saving", ["", "--async-save"])
def test_two_signals_in_one_moment_save_once(here, argv, tmp_path: Path, monkeypatch, signals, name, saving):
    owner, function, step = MOMENTS[name]
    run = build_run(parse_config(argv(f"{saving} --save-interval {step}")), here, signals)
    signal_within(monkeypatch, owner, function)
    assert train(run, signals) is False
    done = checkpoints(tmp_path / "run")
    # With --async-save a checkpoint is published during later steps, so the run stops after one of those.
    assert len(done) == 1 or (saving and len(done) == 2)
    assert done[0] == f"iter_{step:07d}"
    assert [line["step"] for line in read_metrics(run.directory.metrics) if "loss" in line][-1] == int(done[-1][5:])
    monkeypatch.undo()


SET_UP = {
    "an index": (samples, "GPTDataset"),
    "the order of a blend": (samples.numpy, "save"),
    "the settings": (run_directory, "versions"),
}


@pytest.mark.parametrize("name", SET_UP)
def test_signals_during_set_up_leave_no_partial_file(here, argv, tmp_path: Path, monkeypatch, signals, name):
    with monkeypatch.context() as patches:
        signal_within(patches, *SET_UP[name])
        with pytest.raises(StoppedInSetUp):
            build_run(parse_config(argv()), here, signals)
    assert not half_written(tmp_path)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run = build_here(argv())
    assert run.first_step == 0
    run.directory.leave()


def start(command: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, metrics: Path, step: int) -> None:
    """Return as soon as a run has logged a step."""
    wait_for(process, lambda: metrics.exists() and any(line["step"] >= step for line in read_metrics(metrics)))


def wait_for(process: subprocess.Popen, what: Callable[[], bool]) -> None:
    """Return as soon as a condition holds; fail if the run ends earlier or takes too long."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not what():
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            assert time.monotonic() < deadline_s
            continue
        raise AssertionError(process.stderr.read())


def test_a_run_stopped_by_two_signals_resumes_from_its_checkpoint(here, argv, tmp_path: Path):
    process = start([sys.executable, "pretrain_tst.py", *argv(LONG)])
    wait_for_step(process, tmp_path / "run" / "metrics.jsonl", 6)
    for number in STOP_SIGNALS:
        process.send_signal(number)
    _, screen = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == EXIT_RESUMABLE == 75, screen
    # The kernel chooses which of two pending signals it delivers first.
    assert re.search(rf"by SIG(TERM|USR1); continue with --load {tmp_path / 'run' / 'checkpoints'}", screen)
    assert "Traceback" not in screen
    done = int((tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    run = build_here(argv(f"{LONG} --load {tmp_path / 'run' / 'checkpoints'}"))
    assert run.first_step == done >= 6
    run.directory.leave()


def test_a_signal_during_set_up_prints_one_line_and_exits_with_75(argv, tmp_path: Path):
    program = (
        "import os, runpy, signal\n"
        "from megatron_tst.training import build\n"
        "build.build_run_data = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "runpy.run_path('pretrain_tst.py', run_name='__main__')"
    )
    process = start([sys.executable, "-c", program, *argv()])
    _, screen = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, screen) == (
        EXIT_RESUMABLE,
        "pretrain_tst.py: stopped by SIGTERM before the first step; start the same command again\n",
    )
    assert not (tmp_path / "run").exists()


def torchrun(argv: list[str], *program: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, *program, "pretrain_tst.py", *argv]


# The moment in which the ranks are held, the call of its function, and the first of the two signals.
PLACES = [
    ("an index", 1, signal.SIGTERM),
    ("a step", 7, signal.SIGUSR1),
    ("an evaluation", 1, signal.SIGTERM),
    ("a save", 1, signal.SIGUSR1),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("moment", "call", "first"), PLACES)
def test_signals_to_torchrun_and_its_ranks_save_once(argv, tmp_path: Path, moment, call, first):
    """All processes get two signals, as from a scheduler; shells record the ranks' codes, as torchrun exits with 1."""
    codes, metrics = tmp_path / "codes", tmp_path / "run" / "metrics.jsonl"
    python = f'"{sys.executable}" -m tests.training.held "{tmp_path}" "{moment}:{call}"'
    shell = f'trap : TERM USR1; {python} "$0" "$@"; code=$?; echo $code >> {codes}; exit $code'
    process = start(torchrun(argv(LONG), "--no-python", "sh", "-c", shell))
    wait_for(process, (tmp_path / "here").exists)
    agent = psutil.Process(process.pid)
    below = agent.children(recursive=True)
    for number in sorted(STOP_SIGNALS, key=lambda number: number != first):
        for member in [*below, *([agent] if number == signal.SIGTERM else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)
    (tmp_path / "go_on").touch()
    _, screen = process.communicate(timeout=TIMEOUT_S)
    assert codes.read_text() == f"{EXIT_RESUMABLE}\n" * 2, screen
    assert process.returncode == 1
    if moment == "an index":
        line = r"stopped by SIG(?:TERM|USR1) before the first step; start the same command again"
        assert len(re.findall(line, screen)) == 1 and "[rank" not in screen, screen
        assert not metrics.exists() and not half_written(tmp_path)
        return
    assert len(re.findall(r"by SIG(?:TERM|USR1); continue with --load", screen)) == 1
    last = max(line["step"] for line in read_metrics(metrics))
    assert checkpoints(tmp_path / "run")[-1] == f"iter_{last:07d}"
    # The end of the phase at step 4 is always saved.
    assert len(checkpoints(tmp_path / "run")) == (1 if last == 4 else 2)


@pytest.mark.distributed
def test_ranks_save_and_stop_if_torchrun_dies(argv, tmp_path: Path):
    process = start(torchrun(argv(LONG)))
    wait_for_step(process, tmp_path / "run" / "metrics.jsonl", 6)
    process.send_signal(signal.SIGUSR1)
    # The ranks hold the other end of the pipe, so communicate() returns after the last of them has ended.
    _, screen = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGUSR1
    assert "by the end of torchrun; continue with --load" in screen
    last = max(line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert checkpoints(tmp_path / "run")[-1] == f"iter_{last:07d}"


def test_exit_duration_in_mins_stops_a_run(here, argv, tmp_path: Path):
    train_here(argv("--exit-duration-in-mins 1e-9"))
    assert checkpoints(tmp_path / "run") == ["iter_0000001"]
