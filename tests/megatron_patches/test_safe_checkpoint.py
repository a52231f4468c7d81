"""Loading a checkpoint never executes anything that it contains."""

import io
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_tst.config import UserError
from megatron_tst.megatron_patches.safe_checkpoint import read_metadata, safe_loading
from megatron_tst.megatron_patches.shard_writer import ShardWriting, planning_for_threads
from megatron_tst.megatron_patches.versions import DIFFERENCES, save_settings


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def save(content, folder: Path):
    folder.mkdir()
    with planning_for_threads():
        request = dist_checkpointing.save(content, str(folder), async_sharded_save=True, **save_settings())
    return ShardWriting(request, keep_training=False).finish()


def content(entry):
    return {"entry": ShardedObject("entry", entry, (1,), (0,))}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def test_bomb_goes_off_when_it_is_unpickled(canary):
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()


def test_plain_entries_are_loaded(rank, tmp_path: Path):
    save(content([1, "two", torch.ones(3)]), tmp_path / "c")
    assert isinstance(read_metadata(tmp_path / "c"), Metadata)
    with safe_loading():
        loaded = dist_checkpointing.load(content(None), str(tmp_path / "c"))
    assert loaded["entry"][:2] == [1, "two"] and torch.equal(loaded["entry"][2], torch.ones(3))


def test_bomb_in_the_table_of_contents_is_refused(rank, tmp_path: Path, canary):
    save(content([1]), tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(UserError, match=r"\.metadata: cannot be read .* it names"):
        read_metadata(tmp_path / "c")
    assert not canary.exists()


def test_bomb_among_the_entries_is_refused(rank, tmp_path: Path, canary):
    save(content(Bomb(canary)), tmp_path / "c")
    with safe_loading(), pytest.raises(BaseException, match=r"entry/shard_0_1: cannot be read: it names "):
        dist_checkpointing.load(content(None), str(tmp_path / "c"))
    assert not canary.exists()


def test_bomb_among_the_entries_goes_off_without_safe_loading(rank, tmp_path: Path, canary):
    save(content(Bomb(canary)), tmp_path / "c")
    dist_checkpointing.load(content(None), str(tmp_path / "c"))
    assert canary.exists()


def test_bomb_in_the_common_file_is_refused(rank, tmp_path: Path, canary):
    save(content([1]), tmp_path / "c")
    torch.save({"iteration": Bomb(canary)}, tmp_path / "c" / "common.pt")
    with safe_loading(), pytest.raises(UserError, match=r"common\.pt: cannot be read: it names "):
        dist_checkpointing.load(content(None), str(tmp_path / "c"))
    assert not canary.exists()


def save_with_common_entry(folder: Path, state: dict[str, Any]):
    """With any version, save the common state as an entry, as megatron-core does from 0.19 on."""
    entry = ShardedObject("common_state", state, (1,), (0,))
    save({**content([1]), **(state if DIFFERENCES["plain values"].is_here() else {"common_state": entry})}, folder)
    (folder / "common.pt").unlink(missing_ok=True)


def test_common_state_is_loaded_from_its_entry(rank, tmp_path: Path):
    save_with_common_entry(tmp_path / "c", {"iteration": 7, "args": Namespace(num_layers=2)})
    with safe_loading():
        loaded = dist_checkpointing.load(content(None), str(tmp_path / "c"))
    assert loaded["iteration"] == 7 and loaded["args"].num_layers == 2 and loaded["entry"] == [1]


def test_bomb_in_the_common_entry_is_refused(rank, tmp_path: Path, canary):
    save_with_common_entry(tmp_path / "c", {"iteration": Bomb(canary)})
    with safe_loading(), pytest.raises(UserError, match=r"common_state/shard_0_1: cannot be read: it names "):
        dist_checkpointing.load(content(None), str(tmp_path / "c"))
    assert not canary.exists()


def test_bomb_in_the_common_entry_goes_off_without_safe_loading(rank, tmp_path: Path, canary):
    save_with_common_entry(tmp_path / "c", {"iteration": Bomb(canary)})
    if DIFFERENCES["plain values"].is_here():
        dist_checkpointing.load(content(None), str(tmp_path / "c"))
    else:
        # 0.16.1 does not read this entry, but loading it with torch executes it.
        torch_checkpoint.load({"common_state/shard_0_1": io.BytesIO()}, checkpoint_id=str(tmp_path / "c"))
    assert canary.exists()


@pytest.mark.parametrize("data", [b"", b"not a pickle", pickle.dumps({"a": 1})])
def test_damaged_table_of_contents_is_refused(tmp_path: Path, data):
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as a checkpoint's table of contents"):
        read_metadata(tmp_path)


def test_directory_without_a_table_of_contents_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="is not a checkpoint"):
        read_metadata(tmp_path)


def test_dtypes_are_allowed_and_functions_of_torch_are_refused(tmp_path: Path):
    for name, passes in (("bfloat16", True), ("load", False)):
        buffer = io.BytesIO()
        pickle.dump(getattr(torch, name), buffer)
        (tmp_path / ".metadata").write_bytes(buffer.getvalue())
        with pytest.raises(UserError, match="it holds" if passes else "it names"):
            read_metadata(tmp_path)


class ByAttribute:
    """Pickled as ``getattr(owner, name)``, as Python 3.11.0 to 3.11.3 pickle an enumeration's members."""

    def __init__(self, owner: type, name: str):
        self.reduced = getattr, (owner, name)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("owner", "name", "answer"),
    [
        (WriteItemType, "TENSOR", "it holds <enum 'WriteItemType'>"),
        (WriteItemType, "__init__", "cannot be read"),
        (Path, "unlink", "it names .*Path.*unlink"),
    ],
)
def test_only_attributes_that_are_enumeration_members_are_allowed(tmp_path: Path, owner, name, answer):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(ByAttribute(owner, name)))
    with pytest.raises(UserError, match=answer):
        read_metadata(tmp_path)
