"""Error handling for checkpoint files that megatron-core writes only on the main rank, between collectives."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tst.distributed.parallel_state import every_rank
from megatron_tst.megatron_patches.common_state import COMMON_STATE
from megatron_tst.megatron_patches.safe_checkpoint import METADATA
from megatron_tst.megatron_patches.shard_writer import refusal
from megatron_tst.megatron_patches.versions import common_state_writers

# For each file: owner and name of the function that writes it, and a function from its arguments to the file's path.
_WRITERS: tuple[tuple[Any, str, Callable[..., Path]], ...] = (
    *((owner, name, lambda _, state, folder: Path(folder) / COMMON_STATE) for owner, name in common_state_writers()),
    (FileSystemWriterAsync, "finish", lambda writer, *_: Path(writer.path) / METADATA),
    (serialization, "save_config", lambda _, folder: Path(folder) / "metadata.json"),
)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Make every rank fail if the main rank cannot write one of these files inside the block.

    An error raised while the file is written would leave the other ranks waiting in the next collective, and they would
    exit with different codes.

    Collective: every rank of the world enters and leaves it.

    Raises:
        CheckpointException: on every rank, at the end of the block.
    """
    failures: dict[int, Any] = {}
    originals = [getattr(owner, name) for owner, name, _ in _WRITERS]
    for (owner, name, path_of), write in zip(_WRITERS, originals, strict=True):
        setattr(owner, name, _held_back(write, path_of, failures))
    try:
        yield
    finally:
        for (owner, name, _), write in zip(_WRITERS, originals, strict=True):
            setattr(owner, name, write)
    if any(every_rank(bool(failures))):
        raise CheckpointException("write", failures)


def _held_back(write: Callable[..., None], path_of: Callable[..., Path], failures: dict[int, Any]) -> Any:
    """Return a function that calls ``write`` and records an error instead of raising it."""

    def write_or_note(*args: Any) -> None:
        try:
            write(*args)
        # torch's archive writer raises RuntimeError.
        except (OSError, RuntimeError) as error:
            failures.setdefault(0, (refusal(path_of(*args), error), None))

    return write_or_note
