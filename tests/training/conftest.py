import subprocess
from pathlib import Path

import pytest

from megatron_tst.training import run as run_module


@pytest.fixture
def here(rank, monkeypatch):
    """Let a run use the ranks that the tests have joined; the process groups can be joined only once."""
    monkeypatch.setattr(run_module, "join_ranks", lambda *_: rank)
    return rank


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)
