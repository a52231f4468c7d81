"""Shards are written in place, with the values that they had when the save began."""

import threading
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_tst.megatron_patches import shard_writer
from megatron_tst.megatron_patches.safe_checkpoint import safe_loading
from megatron_tst.megatron_patches.shard_writer import InPlaceSaveStrategy, ShardWriting, planning_for_threads
from megatron_tst.megatron_patches.versions import save_settings

BUFFER = torch.arange(1000.0)


def shards(buffer):
    """Return two tensors that share a buffer, as parameters do, and one that is not contiguous."""
    parts = {"a": buffer[:400].view(20, 20), "b": buffer[400:], "c": buffer[:400].view(20, 20).t()}
    return {name: ShardedTensor.from_rank_offsets(name, part) for name, part in parts.items()}


def plan(buffer, folder: Path):
    folder.mkdir()
    with planning_for_threads():
        strategy = InPlaceSaveStrategy("torch_dist", 1)
        settings = {"async_sharded_save": True, **save_settings()}
        return dist_checkpointing.save(shards(buffer), str(folder), strategy, **settings)


def load(folder: Path):
    with safe_loading():
        return dist_checkpointing.load(shards(torch.zeros(1000)), str(folder))


def planned(request):
    """Return the tensors of a planned save by name."""
    _, buckets, _ = request.async_fn_args
    return {item.index.fqn: tensor for _, _, (_, tensors) in buckets for item, tensor in tensors}


def test_views_are_written_without_the_rest_of_their_buffer(rank, tmp_path: Path):
    ShardWriting(plan(BUFFER.clone(), tmp_path / "c"), keep_training=False).finish()
    loaded = load(tmp_path / "c")
    assert all(torch.equal(loaded[name], shard.data) for name, shard in shards(BUFFER).items())
    # The tensors have 400, 600 and 400 elements; writing the whole buffer for each would take 12 kB.
    assert sum(path.stat().st_size for path in (tmp_path / "c").glob("*.distcp")) < 1400 * 4 + 3 * 2000


def test_contiguous_host_tensors_are_planned_without_a_copy(rank, tmp_path: Path):
    buffer = BUFFER.clone()
    tensors = planned(plan(buffer, tmp_path / "c"))
    assert tensors["a"].data_ptr() == buffer.data_ptr() and tensors["b"].data_ptr() == buffer[400:].data_ptr()
    assert tensors["c"].data_ptr() != buffer.data_ptr()


@pytest.mark.parametrize("keep_training", [True, False])
def test_training_does_not_change_what_is_being_written(rank, tmp_path: Path, monkeypatch, keep_training):
    """Negative control: without the copy, the values after training are written."""
    changed, write = threading.Event(), shard_writer.write_shard
    monkeypatch.setattr(shard_writer, "write_shard", lambda *args: changed.wait(60) and write(*args))
    buffer = BUFFER.clone()
    writing = ShardWriting(plan(buffer, tmp_path / "c"), keep_training)
    buffer.fill_(-1)
    changed.set()
    writing.finish()
    assert torch.equal(load(tmp_path / "c")["b"], BUFFER[400:]) == keep_training


@pytest.mark.parametrize("keep_training", [True, False])
def test_tensors_are_released_after_they_are_written(rank, tmp_path: Path, keep_training):
    request = plan(BUFFER.clone(), tmp_path / "c")
    assert planned(request)
    ShardWriting(request, keep_training).finish()
    assert planned(request) == {}
