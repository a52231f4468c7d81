"""Read megatron-core's checkpoints without executing anything from them.

A ``torch_dist`` checkpoint stores its table of contents (``.metadata``) and its non-tensor entries as pickles, which
torch.distributed.checkpoint reads with the plain unpickler. This module reads both with fixed lists of allowed classes.
"""

import contextlib
import enum
import functools
import importlib
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.futures import Future

from megatron_tst.config import UserError
from megatron_tst.megatron_patches.common_state import read_common_state, unpickle
from megatron_tst.megatron_patches.versions import common_state_reader

METADATA = ".metadata"

# The names that a table of contents needs, by module. No other name is looked up, so nothing else can be called.
_ALLOWED: dict[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    "torch.distributed.checkpoint.planner": frozenset(
        {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"}
    ),
    "megatron.core.dist_checkpointing.strategies.torch": frozenset({"MCoreMetadata", "MCoreSavePlan"}),
    "torch": frozenset({"Size"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"Path", "PosixPath"}),
}  # fmt: skip


def _enum_member(kind: Any, name: str) -> enum.Enum:
    """Replace ``getattr``, with which Python 3.11.0 to 3.11.3 pickle the members of an enumeration."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError(f"it names {kind}.{name}, which no checkpoint needs")
    return kind[name]


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that accepts only the names that a table of contents needs."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class or function; refuse every other name."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return getattr(importlib.import_module(module), name)


def read_metadata(folder: Path) -> Metadata:
    """Read a checkpoint's table of contents without executing anything from it.

    Args:
        folder: the checkpoint's directory, ``iter_0000123``.

    Raises:
        UserError: if the table is missing or damaged, or names anything that such a table does not need.
    """
    path = folder / METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise UserError(f"{folder}: is not a checkpoint: {path.name} is missing") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: cannot be read as a checkpoint's table of contents: {error}") from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path}: cannot be read as a checkpoint's table of contents: it holds {type(metadata)}")
    return metadata


class _SafeReader(FileSystemReader):
    """Reads the shards of a checkpoint; torch itself loads the tensors with ``weights_only=True``."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read the table of contents with the fixed list of allowed classes."""
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = None
        return metadata

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        """Read what is planned; the planner's own ``load_bytes`` would execute non-tensor entries."""
        planner.load_bytes = functools.partial(_load_entry, planner)
        return super().read_data(plan, planner)


def _load_entry(planner: Any, read_item: ReadItem, value: io.BytesIO) -> None:
    """Store one entry at its place in the state dictionary."""
    name = read_item.dest_index.fqn
    entry = unpickle(value, name)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], entry)
    else:
        planner.state_dict[name] = entry


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """Keep megatron-core's ``dist_checkpointing.load`` from executing anything that it reads."""

    def read_common(*arguments: Any) -> dict[str, Any]:
        """Read from the directory in the last argument; if the function is a method, its object precedes it."""
        folder = Path(arguments[-1])
        return read_common_state(folder, read_metadata(folder))

    with (
        _replaced(torch_strategy, "_get_filesystem_reader", lambda folder, *_, **__: _SafeReader(folder)),
        _replaced(*common_state_reader(), read_common),
        warnings.catch_warnings(),
    ):
        # megatron-core calls functions of torch.distributed.checkpoint that torch has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        # In later versions each rank loads by itself, which makes torch warn of a likely mistake.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", "The argument order of load has been changed")
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)
