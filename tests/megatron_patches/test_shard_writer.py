"""Shards are written as they were when the save began, from where they lie."""

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
    """Two tensors in one buffer, as parameters lie, and one that is not contiguous."""
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
    """The tensors of a save that is planned, by name."""
    _, buckets, _ = request.async_fn_args
    return {item.index.fqn: tensor for _, _, (_, tensors) in buckets for item, tensor in tensors}


def test_views_are_written_whole_and_alone(rank, tmp_path: Path):
    ShardWriting(plan(BUFFER.clone(), tmp_path / "c"), keep_training=False).finish()
    loaded = load(tmp_path / "c")
    assert all(torch.equal(loaded[name], shard.data) for name, shard in shards(BUFFER).items())
    # Three tensors of 400, 600 and 400 numbers; the whole buffer for each would be 12 kB.
    assert sum(path.stat().st_size for path in (tmp_path / "c").glob("*.distcp")) < 1400 * 4 + 3 * 2000


def test_what_lies_in_host_memory_is_planned_without_a_copy(rank, tmp_path: Path):
    buffer = BUFFER.clone()
    tensors = planned(plan(buffer, tmp_path / "c"))
    assert tensors["a"].data_ptr() == buffer.data_ptr() and tensors["b"].data_ptr() == buffer[400:].data_ptr()
    assert tensors["c"].data_ptr() != buffer.data_ptr()


@pytest.mark.parametrize("keep_training", [True, False])
def test_training_changes_nothing_that_is_being_written(rank, tmp_path: Path, monkeypatch, keep_training):
    """The control: without the copy, what is written is what training has made of it."""
    changed, write = threading.Event(), shard_writer._write
    monkeypatch.setattr(shard_writer, "_write", lambda *args: changed.wait(60) and write(*args))
    buffer = BUFFER.clone()
    writing = ShardWriting(plan(buffer, tmp_path / "c"), keep_training)
    buffer.fill_(-1)
    changed.set()
    writing.finish()
    assert torch.equal(load(tmp_path / "c")["b"], BUFFER[400:]) == keep_training


@pytest.mark.parametrize("keep_training", [True, False])
def test_tensors_are_let_go_of_once_they_are_written(rank, tmp_path: Path, keep_training):
    request = plan(BUFFER.clone(), tmp_path / "c")
    assert planned(request)
    ShardWriting(request, keep_training).finish()
    assert planned(request) == {}
