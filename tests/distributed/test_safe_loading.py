"""Loading never executes anything from a checkpoint, also when ranks share the reading and exchange what they read."""

import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_tst.checkpoint.load import shared_reading
from megatron_tst.distributed import ParallelSizes, destroy_parallel_state, init_parallel_state
from megatron_tst.megatron_patches.safe_checkpoint import safe_loading
from megatron_tst.megatron_patches.shard_writer import ShardWriting, planning_for_threads
from megatron_tst.megatron_patches.versions import save_settings
from tests.checkpoint.saved import change_contents
from tests.distributed.launch import run_distributed

pytestmark = pytest.mark.distributed

# The place of the bomb, and whether megatron-core executes it without safe_loading.
PLACES = {".metadata": True, "metadata.json": False, "common.pt": False, "entry": True, "tensor": False}


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def content(rank: int):
    """Return the content on both ranks: two tensors, of which each rank reads one, and an entry."""
    tensors = {
        name: ShardedTensor.from_rank_offsets(name, torch.full((3,), value), replica_id=rank)
        for name, value in (("tensor", 1.0), ("other", 2.0))
    }
    return {**tensors, "entry": ShardedObject("entry", ["text"], (1,), (0,), replica_id=rank), "iteration": 3}


def archive(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def put_bomb(folder: Path, place: str, bomb: Bomb) -> None:
    """Replace a file of a checkpoint, or an entry or a tensor in a shard, by a bomb."""
    if place in (".metadata", "metadata.json"):
        (folder / place).write_bytes(pickle.dumps(bomb))
    elif place == "common.pt":
        torch.save({"iteration": bomb}, folder / place)
    else:
        shard, bytes_ = folder / "__0_0.distcp", archive([bomb] if place == "entry" else bomb)
        offset = shard.stat().st_size
        shard.write_bytes(shard.read_bytes() + bytes_)

        def point_at_bomb(metadata):
            found = next(found for index, found in metadata.storage_data.items() if index.fqn.startswith(place))
            found.relative_path, found.offset, found.length = shard.name, offset, len(bytes_)

        change_contents(folder, point_at_bomb)


def load_bomb(folder: Path, place: str, is_guarded: bool) -> str:
    """Save, insert a bomb, and load; return the result of loading or its error."""
    ranks = init_parallel_state(ParallelSizes())
    if ranks.is_main:
        folder.mkdir()
    dist.barrier()
    with planning_for_threads():
        request = dist_checkpointing.save(content(ranks.rank), str(folder), async_sharded_save=True, **save_settings())
    ShardWriting(request, keep_training=False).finish()
    if ranks.is_main and place:
        put_bomb(folder, place, Bomb(folder / "executed"))
    dist.barrier()
    load = dist_checkpointing.load
    try:
        if is_guarded:
            with safe_loading():
                loaded = load(content(ranks.rank), str(folder), shared_reading(ranks))
        else:
            loaded = load(content(ranks.rank), str(folder), shared_reading(ranks))
        outcome = "loaded" if (loaded["tensor"].tolist(), loaded["entry"]) == ([1.0] * 3, ["text"]) else f"got {loaded}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    dist.barrier()
    destroy_parallel_state()
    return outcome


@pytest.mark.parametrize("place", PLACES)
def test_bomb_is_refused_on_every_rank(tmp_path, place):
    outcomes = run_distributed(load_bomb, 2, tmp_path / "guarded", place, True)
    assert not (tmp_path / "guarded" / "executed").exists()
    assert "loaded" not in outcomes, outcomes


@pytest.mark.parametrize("place", [place for place, is_executed in PLACES.items() if is_executed])
def test_bomb_goes_off_without_safe_loading(tmp_path, place):
    run_distributed(load_bomb, 2, tmp_path / "bare", place, False)
    assert (tmp_path / "bare" / "executed").exists()


def test_checkpoint_without_a_bomb_is_loaded(tmp_path):
    assert run_distributed(load_bomb, 2, tmp_path / "whole", "", True) == ["loaded", "loaded"]
