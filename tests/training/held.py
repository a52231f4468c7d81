"""Run a program that waits for signals at a given moment: in a step, a save, an evaluation or the building of an index.

python -m tests.training.held FOLDER MOMENT:CALL PROGRAM [flags]

At the given call of the moment's function, the program creates the file `here` in the folder. It continues as soon as
it has received a signal and a file `go_on` exists, so a test works on a machine of any speed. Later signals are merged
with the first.
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
    "a save": (CheckpointSaver, "publish"),
}


def hold(moment: str, call: int, folder: Path) -> None:
    """Make one call of a moment's function wait."""
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
    """Install the hold, then run the program in this process."""
    moment, _, call = place.partition(":")
    signals.ONE_REQUEST_S = 1e9
    hold(moment, int(call), Path(folder))
    sys.argv = list(program)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
