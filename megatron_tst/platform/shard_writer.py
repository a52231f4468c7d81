"""Writing megatron-core's checkpoint shards from threads of this process.

megatron-core writes shards from forked processes and collects their results through a manager process that it spawns.
A process that holds a CUDA context, NCCL and loader workers is better not forked, and a spawned one imports the
program again. Threads have neither fault; writing and hashing leave the interpreter's lock free.
"""

import contextlib
import hashlib
import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_tst.platform.versions import results_queue_name

HASH_BLOCK_BYTES = 1 << 22


@contextlib.contextmanager
def planning_for_threads() -> Iterator[None]:
    """Make the save requests planned inside report through a queue of this process."""
    name = results_queue_name()
    original = getattr(filesystem_async, name)
    setattr(filesystem_async, name, queue.Queue)
    try:
        yield
    finally:
        setattr(filesystem_async, name, original)


class ShardWriting:
    """This rank's files of one checkpoint on their way to disk."""

    def __init__(self, request: AsyncRequest, keep_training: bool) -> None:
        """Start to write this rank's tensors as they are now.

        Args:
            request: what ``dist_checkpointing.save(..., async_sharded_save=True)`` returned.
            keep_training: whether tensors may change before :meth:`finish`: they are copied first.
        """
        self._request = request
        self._results: queue.Queue[Any] | None = None
        buckets, transforms = [], []
        # A rank that owns nothing has no function to call.
        if request.async_fn is not None:
            transforms, _ = request.async_fn.args
            _, planned, self._results = request.async_fn_args
            buckets = [_on_host(bucket, copy=keep_training) for bucket in planned]
        self._threads = ThreadPoolExecutor(max(len(buckets), 1), thread_name_prefix="checkpoint")
        self._writes: list[Future[Any]] = [
            self._threads.submit(_write, transforms, number, bucket) for number, bucket in enumerate(buckets)
        ]

    @property
    def is_done(self) -> bool:
        """Whether each file of this rank is written, or has failed."""
        return all(write.done() for write in self._writes)

    def finish(self) -> dict[str, str]:
        """Wait for this rank's files, then complete the checkpoint's table of contents.

        Collective: every rank of the world calls it.

        Returns:
            The SHA-256 of this rank's files, by name.

        Raises:
            CheckpointException: on every rank, if one of them could not write.
        """
        self._threads.shutdown(wait=True)
        written = [write.result() for write in self._writes]
        if self._results is not None:
            failure = next((result for result, _, _ in written if isinstance(result, Exception)), None)
            self._results.put(failure or {number: result for number, (result, _, _) in enumerate(written)})
        for function in self._request.finalize_fns:
            function()
        return {name: digest for _, name, digest in written}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _on_host(bucket: Any, copy: bool) -> Any:
    """Bring a file's tensors to the host's memory; those that are there already are copied if asked."""
    path, name, (entries, tensors) = bucket
    return path, name, (entries, [(item, tensor.to("cpu", copy=copy)) for item, tensor in tensors])


def _write(transforms: list[Any], number: int, bucket: Any) -> tuple[Any, str, str]:
    """Write one file with megatron-core's function; returns its results or its exception, the name and the SHA-256."""
    path, name, _ = bucket
    results: queue.Queue[Any] = queue.Queue()
    # megatron-core's function ticks off a queue of files to write; this one holds the one file.
    pending: queue.Queue[int] = queue.Queue()
    pending.put(number)
    write_file = filesystem_async.FileSystemWriterAsync.write_preloaded_data
    write_file(transforms, number, bucket, results, pending, use_fsync=True)
    _, result = results.get()
    if isinstance(result, Exception):
        return _reason(Path(path), result), name, ""
    return result, name, sha256(Path(path))


def _reason(path: Path, error: Exception) -> OSError:
    """Return what the disk says of a file that could not be written: torch's archive writer hides it."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, str(path))
    try:
        with path.open("ab") as file:
            file.write(bytes(HASH_BLOCK_BYTES))
    except OSError as refusal:
        return OSError(refusal.errno, refusal.strerror, str(path))
    return OSError(f"{error}: {path}")
