"""Write megatron-core's checkpoint shards on threads of this process.

megatron-core writes shards in forked processes and collects their results through a manager process that it spawns.
A process with a CUDA context, NCCL and dataloader workers should not be forked, and a spawned process imports the
program again. Threads avoid both problems; writing and hashing release the interpreter lock.
"""

import contextlib
import hashlib
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

from megatron_tst.megatron_patches.versions import results_queue_name

HASH_BLOCK_BYTES = 1 << 22


class InPlaceSaveStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's save strategy, which plans to write host tensors in place, without copying them."""

    def async_save(self, sharded_state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> AsyncRequest:
        """Plan to write this rank's shards. Collective: every rank of the world calls it."""
        for shard in nested_values(sharded_state_dict):
            if isinstance(shard, ShardedTensor):
                shard.data = _without_slack(shard.data)
        return super().async_save(sharded_state_dict, *args, **kwargs)


@contextlib.contextmanager
def planning_for_threads() -> Iterator[None]:
    """Make the save requests that are planned inside report their results through a queue of this process."""
    name = results_queue_name()
    original = getattr(filesystem_async, name)
    setattr(filesystem_async, name, queue.Queue)
    try:
        yield
    finally:
        setattr(filesystem_async, name, original)


class ShardWriting:
    """This rank's files of one checkpoint while they are being written."""

    def __init__(self, request: AsyncRequest, keep_training: bool) -> None:
        """Start writing this rank's tensors with their current values.

        Args:
            request: the request that ``dist_checkpointing.save(..., async_sharded_save=True)`` returned.
            keep_training: whether tensors may change before :meth:`finish`; if so, they are copied first.
        """
        self._request = request
        self._results: queue.Queue[Any] | None = None
        buckets, transforms = [], []
        # A rank without files to write has no function to call.
        if request.async_fn is not None:
            transforms, _ = request.async_fn.args
            _, buckets, self._results = request.async_fn_args
        if keep_training:
            _copy_to_host(buckets)
        self._threads = ThreadPoolExecutor(max(len(buckets), 1), thread_name_prefix="checkpoint")
        self._writes: list[Future[Any]] = [
            self._threads.submit(write_shard, transforms, number, bucket) for number, bucket in enumerate(buckets)
        ]

    @property
    def is_done(self) -> bool:
        """Whether every file of this rank has been written or has failed."""
        return all(write.done() for write in self._writes)

    def finish(self) -> dict[str, str]:
        """Wait for this rank's files, then write the checkpoint's table of contents.

        Collective: every rank of the world calls it.

        Returns:
            The SHA-256 digests of this rank's files, by name.

        Raises:
            CheckpointException: on every rank, if any rank could not write.
        """
        self._threads.shutdown(wait=True)
        written = [write.result() for write in self._writes]
        if self._results is not None:
            failure = next((result for result, _, _ in written if isinstance(result, Exception)), None)
            self._results.put(failure or {number: result for number, (result, _, _) in enumerate(written)})
        for function in self._request.finalize_fns:
            function()
        return {name: digest for _, name, digest in written}


def sha256(path: Path, on_progress: Callable[[int], object] = lambda _: None) -> str:
    """Return a file's SHA-256 in hexadecimal; ``on_progress`` receives the number of bytes of each block read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
            on_progress(len(block))
    return digest.hexdigest()


def _without_slack(tensor: Tensor) -> Tensor:
    """Return a tensor over the same host memory whose storage spans only the tensor itself.

    torch.save writes the whole storage of a view, so megatron-core copies every view first. Parameters are views of the
    buffer that holds all of them.
    """
    if not tensor.is_cpu or not tensor.is_contiguous():
        return tensor
    start = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


def _copy_to_host(buckets: list[Any]) -> None:
    """Replace each planned tensor by a host copy and drop the reference to it, which frees gathered tensors."""
    planned = [(tensors, place) for _, _, (_, tensors) in buckets for place in range(len(tensors))]
    # Sorted by address, the parts of a tensor are adjacent, and the tensor is freed after the last of them.
    for tensors, place in sorted(planned, key=lambda one: one[0][one[1]][1].data_ptr()):
        item, tensor = tensors[place]
        tensors[place] = item, tensor.to("cpu", copy=True)


def _taken(tensors: list[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
    """Yield planned tensors in host memory one by one, and drop the reference to each after it is written."""
    tensors.reverse()
    while tensors:
        item, tensor = tensors.pop()
        yield item, tensor.to("cpu")


def write_shard(transforms: list[Any], number: int, bucket: Any) -> tuple[Any, str, str]:
    """Write one file with megatron-core's function; return its results or exception, the name and the SHA-256."""
    path, name, (entries, tensors) = bucket
    results: queue.Queue[Any] = queue.Queue()
    # megatron-core's function removes an item from a queue of files to write, which holds only this file here.
    pending: queue.Queue[int] = queue.Queue()
    pending.put(number)
    write_file = filesystem_async.FileSystemWriterAsync.write_preloaded_data
    write_file(transforms, number, (path, name, (entries, _taken(tensors))), results, pending, use_fsync=True)
    _, result = results.get()
    if isinstance(result, Exception):
        return refusal(Path(path), result), name, ""
    return result, name, sha256(Path(path))


def refusal(path: Path, error: Exception) -> OSError:
    """Return the operating system's error for a file that could not be written, which torch's archive writer hides."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, str(path))
    try:
        with path.open("ab") as file:
            file.write(bytes(HASH_BLOCK_BYTES))
    except OSError as refusal:
        return OSError(refusal.errno, refusal.strerror, str(path))
    return OSError(f"{error}: {path}")
