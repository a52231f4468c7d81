"""The common state: what a checkpoint holds besides shards, such as step counts, settings and Megatron-LM's ``args``.

megatron-core stores it in the file ``common.pt``, and from 0.19 on in an entry of the shards. This module writes the
file, which every version prefers, and reads either of them without executing anything.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_tst.config import UserError

COMMON_STATE = "common.pt"
_ENTRY = MetadataIndex("common_state/shard_0_1")


class ForeignValue:
    """Placeholder for an object whose class the installed megatron-core may lack, such as a setting in ``args``."""

    def __init__(self, *_: Any) -> None:
        """Ignore the object's constructor arguments."""

    def __setstate__(self, state: Any) -> None:
        """Ignore the object's state."""


def write_common_state(folder: Path, content: dict[str, Any], content_metadata: dict[str, Any]) -> None:
    """Write ``common.pt`` unless megatron-core has written it; only the main rank calls it.

    Args:
        folder: the checkpoint's directory.
        content: the state dictionary that was passed to ``dist_checkpointing.save``, shards included.
        content_metadata: the content metadata that was passed with it.

    Raises:
        OSError: if the file cannot be written.
    """
    if not (folder / COMMON_STATE).exists():
        _, plain = extract_matching_values(
            content, lambda value: isinstance(value, ShardedBase | LocalNonpersistentObject)
        )
        buffer = io.BytesIO()
        torch.save({**plain, "content_metadata": content_metadata}, buffer)
        (folder / COMMON_STATE).write_bytes(buffer.getvalue())


def read_common_state(folder: Path, metadata: Metadata) -> dict[str, Any]:
    """Read a checkpoint's common state without executing anything from it.

    Args:
        folder: the checkpoint's directory, ``iter_0000123``.
        metadata: the checkpoint's table of contents.

    Raises:
        UserError: if the common state is missing or damaged, or names functions or classes that no checkpoint needs.
    """
    file = folder / COMMON_STATE
    state = unpickle(io.BytesIO(file.read_bytes()), str(file)) if file.exists() else _read_entry(folder, metadata)
    if not isinstance(state, dict):
        raise UserError(f"{folder}: the checkpoint's common state is not a dictionary")
    return state


def _read_entry(folder: Path, metadata: Metadata) -> Any:
    place = (metadata.storage_data or {}).get(_ENTRY)
    if place is None:
        raise UserError(f"{folder}: has neither {COMMON_STATE} nor the entry {_ENTRY.fqn}")
    file = folder / Path(place.relative_path).name
    try:
        with file.open("rb") as stream:
            stream.seek(place.offset)
            entry = stream.read(place.length)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    values = unpickle(io.BytesIO(entry), f"{file}: {_ENTRY.fqn}")
    return values[0] if isinstance(values, list) and values else values


def unpickle(stream: io.BytesIO, source: str) -> Any:
    """Read the output of ``torch.save``: plain values, tensors, and classes that torch and megatron-core declare safe.

    Objects of other Megatron-LM classes, which may exist only in another version, become :class:`ForeignValue`.

    Args:
        stream: the stream to read.
        source: the stream's name, for messages.

    Raises:
        UserError: if the stream is damaged or names anything else.
    """
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
        wrong = sorted(name for name in unknown if not name.startswith("megatron."))
        if wrong:
            raise pickle.UnpicklingError(f"it names {wrong[0]}, which no checkpoint needs")
        stream.seek(0)
        with torch.serialization.safe_globals([(ForeignValue, name) for name in unknown]):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{source}: cannot be read: {str(error).splitlines()[0]}") from error
