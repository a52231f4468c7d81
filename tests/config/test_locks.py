"""Locks against another process."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tst.config import UserError
from megatron_tst.config.locks import locked

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path):
    path = tmp_path / "out.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(UserError, match="--flag x: another process is writing it"),
            locked(tmp_path / "out", "--flag x"),
        ):
            pass
        assert path.exists()
        other.send_signal(signal.SIGKILL)
        other.wait(timeout=60)
    with locked(tmp_path / "out", "--flag x"):
        assert path.exists()
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--flag x: cannot be written"), locked(tmp_path / "file" / "out", "--flag x"):
        pass
