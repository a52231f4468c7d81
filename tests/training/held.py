"""Run a program that stays where signals are to find it: in a step, a save, an evaluation, or while it indexes.

python -m tests.training.held FOLDER MOMENT:CALL PROGRAM [flags]

At a function's call of that number the program makes the file `here` in the folder; it goes on once it has been
signalled and there is a file `go_on`, however slow the machine is. Any later signal is a part of the first.
"""

import runpy
import signal
import sys
import threading
from pathlib import Path

from megatron_tst.checkpoint.save import CheckpointSaver
from megatron_tst.data import samples
from megatron_tst.distributed import signals
from megatron_tst.training import loop
from megatron_tst.training.step import Stepper

MOMENTS = {
    "an index": (samples, "GPTDataset"),
    "a step": (Stepper, "train"),
    "an evaluation": (loop, "evaluate"),
    "a save": (CheckpointSaver, "_publish"),
}


def hold(moment: str, call: int, folder: Path) -> None:
    """Let one call of a moment's function wait."""
    owner, name = MOMENTS[moment]
    function, calls = getattr(owner, name), []

    def held(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            listener = signal.getsignal(signal.SIGUSR1).__self__
            (folder / "here").touch()
            while not (listener.received and (folder / "go_on").exists()):
                threading.Event().wait(0.05)
        return function(*args, **kwargs)

    setattr(owner, name, held)


def main(folder: str, place: str, *program: str) -> None:
    """Hold, then become the program."""
    moment, _, call = place.partition(":")
    signals.ONE_REQUEST_S = 1e9
    hold(moment, int(call), Path(folder))
    sys.argv = list(program)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
