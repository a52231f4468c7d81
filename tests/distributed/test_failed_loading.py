"""If one rank cannot read its part of a checkpoint, every rank reports it and ends, and none waits for it."""

import os

import pytest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

from megatron_tst.checkpoint import load
from megatron_tst.config import UserError, parse_config
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.megatron_patches import safe_checkpoint
from megatron_tst.megatron_patches.versions import reads_alone
from megatron_tst.training import start_run
from tests.checkpoint.recorded_run import RECORDED, TWO_RANKS, arguments
from tests.distributed.launch import run_distributed

pytestmark = pytest.mark.distributed
LAYOUTS = {"dp2": "--use-distributed-optimizer", "tp2": TWO_RANKS}
# The parts that a rank reads, and the functions that read them.
READERS = {
    "table of contents": (load, "read_metadata"),
    "plain values": (load, "read_common_state"),
    "shards": (safe_checkpoint._SafeReader, "read_data"),
}


def fail(*_):
    raise OSError("the file server is gone")


def start(argv: list[str], part: str | None, is_together: bool) -> str:
    """Start a run in which rank 1 cannot read a part; return the rank's message."""
    if part is not None and os.environ["RANK"] == "1":
        setattr(*READERS[part], fail)
    if not is_together:
        load.LoadTogether = TorchDistLoadShardedStrategy
    try:
        start_run(parse_config(argv), StopSignals())
    except UserError as error:
        return str(error)
    return "started"


@pytest.mark.parametrize("part", READERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_names_the_rank_that_could_not_read(tmp_path, layout, part):
    argv = [*arguments(tmp_path, "run", LAYOUTS[layout]), "--load", str(RECORDED / "0.19.2")]
    said = run_distributed(start, 2, argv, part, True)
    folder = RECORDED / "0.19.2" / "iter_0000004"
    assert said == [f"--load {folder}: cannot be loaded: rank 1: the file server is gone"] * 2


def test_ranks_start_if_all_can_read(tmp_path):
    argv = [*arguments(tmp_path, "run", LAYOUTS["dp2"]), "--load", str(RECORDED / "0.19.2")]
    assert run_distributed(start, 2, argv, None, True) == ["started", "started"]


@pytest.mark.skipif(not reads_alone(), reason="this megatron-core lets its ranks fail together")
def test_megatron_core_leaves_the_other_rank_waiting(tmp_path):
    """Negative control: only the end of the failed rank frees the other one, which does not learn the reason."""
    argv = [*arguments(tmp_path, "run", LAYOUTS["dp2"]), "--load", str(RECORDED / "0.19.2")]
    waiting, failed = run_distributed(start, 2, argv, "shards", False)
    assert failed.endswith("the file server is gone")
    assert "by peer" in waiting
    assert "the file server" not in waiting
