"""Locks that keep another process from writing the same output."""

import signal
from pathlib import Path

import pytest

from megatron_tst.config import UserError
from megatron_tst.config.locks import locked
from tests.locks import held_by_another


def test_lock_is_refused_until_its_holder_ends(tmp_path: Path):
    path = tmp_path / "out.lock"
    with held_by_another(path) as other:
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


def test_error_names_an_output_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--flag x: cannot be written"), locked(tmp_path / "file" / "out", "--flag x"):
        pass
