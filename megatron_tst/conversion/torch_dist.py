"""Reads and writes megatron-core's torch_dist checkpoints one weight at a time, without process group, model or GPU."""

import collections
import io
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_tst.config import UserError
from megatron_tst.megatron_patches.safe_checkpoint import read_metadata

# Index of a weight on the leading axes of the tensor in which it is stacked.
Index = tuple[int, ...]


class _Target(LoadPlanner):
    """A load plan that copies the stored chunks into one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of the tensor that a chunk belongs to."""
        slot = self.tensor
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            slot = slot.narrow(axis, start, length)
        return slot

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing, because the slot is a view of the tensor."""

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("only tensors are read, and only with a plan from this module")

    set_up_planner = create_local_plan = create_global_plan = finish_plan = load_bytes = resolve_bytes = _unused


class StackedWeights:
    """The tensors of a checkpoint, read by key and leading index.

    Attributes:
        entries: size and properties of each tensor, by key.
    """

    def __init__(self, folder: Path) -> None:
        """Read the checkpoint's metadata.

        Args:
            folder: folder of one checkpoint, ``iter_0000123``.

        Raises:
            UserError: if the folder is not a checkpoint, or one of its files is missing or truncated.
        """
        metadata = read_metadata(folder)
        _check_files(folder, metadata)
        found = metadata.state_dict_metadata.items()
        self.entries = {key: entry for key, entry in found if isinstance(entry, TensorStorageMetadata)}
        self._chunks: dict[tuple[str, int], dict[Index, list[ChunkStorageMetadata]]] = {}
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def read(self, key: str, index: Index) -> Tensor:
        """Read one weight: the slice of ``key`` at ``index`` on its leading axes, joined from its chunks.

        The peak memory is that of the weight and its largest chunk.

        Raises:
            UserError: if chunks are damaged or do not cover the weight.
        """
        entry = self.entries[key]
        rest = tuple(entry.size[len(index) :])
        tensor = torch.empty((*(1 for _ in index), *rest), dtype=entry.properties.dtype)
        chunks = self._chunks_at(key, len(index)).get(index, [])
        stored = TensorStorageMetadata(entry.properties, entry.size, chunks)
        wanted = ChunkStorageMetadata(torch.Size((*index, *(0 for _ in rest))), tensor.shape)
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        if sum(item.lengths.numel() for item in items) != tensor.numel():
            raise UserError(f"{self._reader.path}: {key}{list(index)}: its chunks do not cover it")
        try:
            self._reader.read_data(LoadPlan(items), _Target(tensor))
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{self._reader.path}: {key}{list(index)}: cannot be read: {error}") from error
        return tensor.view(rest)

    def _chunks_at(self, key: str, axes: int) -> dict[Index, list[ChunkStorageMetadata]]:
        """Group a tensor's chunks by their leading indices; the result is cached, because there may be thousands."""
        if (key, axes) not in self._chunks:
            sorted_chunks = collections.defaultdict(list)
            for chunk in self.entries[key].chunks:
                spans = zip(chunk.offsets[:axes], chunk.sizes[:axes], strict=True)
                for index in itertools.product(*(range(start, start + length) for start, length in spans)):
                    sorted_chunks[index].append(chunk)
            self._chunks[key, axes] = dict(sorted_chunks)
        return self._chunks[key, axes]


def _check_files(folder: Path, metadata: Metadata) -> None:
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        path = folder / name
        if Path(name).name != name:
            raise UserError(f"{folder}: its metadata names {name}, which is outside the folder")
        if not path.is_file():
            raise UserError(f"{path}: is missing")
        if path.stat().st_size < end:
            raise UserError(f"{path}: is truncated: {path.stat().st_size} of at least {end} bytes")


@dataclass(frozen=True)
class Slice:
    """One weight to write.

    Attributes:
        key: key of the tensor in which the weight is stacked.
        stacked: lengths of the leading axes of that tensor.
        index: index of the weight on the leading axes.
        size: size of the weight.
        dtype: type of the weight.
        load: function that returns the weight, called when it is written.
    """

    key: str
    stacked: tuple[int, ...]
    index: Index
    size: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The place of the weight in the tensor in which it is stacked."""
        offsets = (*self.index, *(0 for _ in self.size))
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size((*(1 for _ in self.index), *self.size)))


class _Source(SavePlanner):
    """A save plan that hands entries to the writer one by one."""

    def __init__(self, slices: dict[MetadataIndex, Slice], on_progress: Callable[[int], object]) -> None:
        self.slices, self.on_progress = slices, on_progress

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return the content of an entry; called when the entry is written."""
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # megatron-core keeps a list per entry
            return nothing
        piece = self.slices[write_item.index]
        tensor = piece.load().reshape(piece.chunk.sizes).contiguous()
        self.on_progress(tensor.nbytes)
        return tensor

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("only a plan from this module is written")

    set_up_planner = create_local_plan = create_global_plan = finish_plan = _unused


def write_stacked(
    folder: Path, slices: Iterable[Slice], empty_states: Iterable[str], on_progress: Callable[[int], object]
) -> None:
    """Write weights as one file of tensors and the checkpoint's metadata.

    Args:
        folder: existing folder without a checkpoint.
        slices: all weights.
        empty_states: keys of empty entries that are not tensors.
        on_progress: called with the number of bytes of each weight.
    """
    entries: dict[str, Any] = {}
    by_index, items = {}, []
    for piece in slices:
        size, properties = torch.Size((*piece.stacked, *piece.size)), TensorProperties(dtype=piece.dtype)
        entry = entries.setdefault(piece.key, TensorStorageMetadata(properties, size, []))
        entry.chunks.append(piece.chunk)
        place = MetadataIndex(piece.key, piece.chunk.offsets, len(entry.chunks) - 1)
        data = TensorWriteData(piece.chunk, properties, size)
        items.append(WriteItem(place, WriteItemType.SHARD, tensor_data=data))
        by_index[place] = piece
    for key in empty_states:
        entries[key] = BytesStorageMetadata()
        items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    writer.set_up_storage_writer(is_coordinator=True)
    plan = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(items))])[0]
    try:
        results = writer.write_data(plan, _Source(by_index, on_progress)).wait()
    except RuntimeError as error:
        # torch's archive writer raises its own error and hides the cause, for example an interruption.
        raise error.__context__ or error from None
    writer.finish(Metadata(entries, planner_data={}), [results])
