"""The signals that form one request to stop, and the reaction of a process to them."""

import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

from megatron_tst.config import EXIT_RESUMABLE, StoppedInSetUp
from megatron_tst.distributed import ParallelSizes, init_parallel_state, run_on_main_rank
from megatron_tst.distributed import signals as signals_module
from megatron_tst.distributed.signals import ONE_REQUEST_S, STOP_SIGNALS, StopSignals, ignore_stop_signals
from tests.distributed.launch import run_distributed
from tests.training.runs import ROOT


@pytest.fixture(autouse=True)
def as_they_were():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Exits:
    """Records exit codes instead of ending the process."""

    def __init__(self, monkeypatch):
        self.codes = []
        monkeypatch.setattr(signals_module.os, "_exit", self.codes.append)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_in_the_set_up_is_not_caught_by_exception_handlers(number):
    signals = StopSignals()
    signals.listen()
    with pytest.raises(StoppedInSetUp, match=f"stopped by {number.name} before the first step") as stopped:
        try:
            send(number)
        except Exception:
            pytest.fail("it was caught as an Exception")
    assert stopped.value.exit_code == EXIT_RESUMABLE
    assert signals.request == number.name


def test_signals_shortly_after_the_first_belong_to_the_same_request(monkeypatch):
    now_s, exits = [100.0], Exits(monkeypatch)
    signals = StopSignals(clock=lambda: now_s[0])
    signals.listen()
    signals.hold()
    assert signals.request is None
    send(signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)
    now_s[0] += ONE_REQUEST_S
    send(signal.SIGTERM)
    assert (signals.request, exits.codes) == ("SIGUSR1", [])
    now_s[0] += 0.001
    send(signal.SIGTERM)
    assert exits.codes == [128 + signal.SIGTERM]


def test_later_signal_ends_the_process_during_the_set_up(monkeypatch):
    now_s, exits = [0.0], Exits(monkeypatch)
    signals = StopSignals(clock=lambda: now_s[0])
    signals.listen()
    with pytest.raises(StoppedInSetUp):
        send(signal.SIGTERM)
    send(signal.SIGTERM)
    now_s[0] += 2 * ONE_REQUEST_S
    send(signal.SIGUSR1)
    assert exits.codes == [128 + signal.SIGUSR1]


def test_later_signal_ends_a_real_process():
    program = (
        "import os, signal\n"
        "from megatron_tst.distributed.signals import StopSignals\n"
        "times = iter([0.0, 60.0])\n"
        "signals = StopSignals(clock=lambda: next(times))\n"
        "signals.listen()\n"
        "signals.hold()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "print(signals.request, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('still there')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "SIGUSR1\n")


@pytest.mark.parametrize("launcher", ["torchrun", "a shell"])
def test_only_the_end_of_torchrun_is_a_request_to_stop(monkeypatch, launcher):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    signals = StopSignals()
    assert signals.request is None
    adoptive = os.getppid() + 1
    monkeypatch.setattr(signals_module.os, "getppid", lambda: adoptive)
    assert signals.request == ("the end of torchrun" if launcher == "torchrun" else None)


def signal_the_last_rank(number: int) -> str | None:
    """Send a signal to the last rank between collectives, where it must not leave the other rank waiting."""
    init_parallel_state(ParallelSizes())
    signals = StopSignals()
    signals.listen()
    try:
        if dist.get_rank() == 1:
            send(number)
        run_on_main_rank(lambda: None)
        signals.check()
    except StoppedInSetUp as stopped:
        return str(stopped)
    return None


def signal_the_main_rank_alone(number: int) -> tuple[str | None, bool]:
    """Send a signal to the main rank while it works alone, which may take minutes, and the other rank waits."""
    init_parallel_state(ParallelSizes())
    StopSignals().listen()
    goes_on = []
    try:
        run_on_main_rank(lambda: (send(number), goes_on.append(True)))
    except StoppedInSetUp as stopped:
        return str(stopped), bool(goes_on)
    return None, bool(goes_on)


@pytest.mark.distributed
def test_ranks_stop_together_during_the_set_up():
    line = "stopped by {} before the first step; start the same command again"
    said = run_distributed(signal_the_last_rank, 2, signal.SIGUSR1)
    assert said == [line.format("a signal to another rank"), line.format("SIGUSR1")]
    assert run_distributed(signal_the_main_rank_alone, 2, signal.SIGTERM) == [(line.format("SIGTERM"), False)] * 2


def test_ignored_signals_do_not_end_the_process():
    ignore_stop_signals()
    send(*STOP_SIGNALS)
