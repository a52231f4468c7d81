import pytest

from megatron_tst.training import run as run_module


@pytest.fixture
def here(rank, monkeypatch):
    """Let a run use the ranks that the tests have joined; the process groups can be joined only once."""
    monkeypatch.setattr(run_module, "join_ranks", lambda *_: rank)
    return rank
