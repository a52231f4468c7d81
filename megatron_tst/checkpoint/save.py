"""Save checkpoints: all ranks write to a temporary directory, which the main rank publishes when it is complete."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tst.checkpoint.checksums import write_checksums
from megatron_tst.checkpoint.content import CONTENT_METADATA
from megatron_tst.checkpoint.folders import CheckpointFolders, writing
from megatron_tst.checkpoint.run_state import RunState, read_run_state, write_run_state
from megatron_tst.config import UserError
from megatron_tst.distributed import ParallelState, every_rank, run_on_main_rank
from megatron_tst.distributed.main_rank_files import failing_together
from megatron_tst.megatron_patches.common_state import COMMON_STATE, write_common_state
from megatron_tst.megatron_patches.shard_writer import InPlaceSaveStrategy, ShardWriting, planning_for_threads
from megatron_tst.megatron_patches.versions import FILES_PER_RANK, save_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    state: RunState
    writing: ShardWriting
    started_s: float


class CheckpointSaver:
    """Saves a run's checkpoints, one at a time.

    Attributes:
        folders: the directories of the checkpoints.
        keep_training: whether :meth:`save` returns before everything is on disk.
    """

    def __init__(
        self,
        folders: CheckpointFolders,
        ranks: ParallelState,
        config_yaml: str,
        *,
        keep_training: bool,
        keep_last: int | None,
    ) -> None:
        """Prepare to save.

        Args:
            folders: the directories of the checkpoints.
            ranks: the parallel state.
            config_yaml: the run's settings, which are saved with the tensors.
            keep_training: whether :meth:`save` returns before everything is on disk.
            keep_last: number of checkpoints to keep besides the permanent ones; None keeps all.
        """
        self.folders, self._ranks, self._config_yaml = folders, ranks, config_yaml
        self.keep_training, self._keep_last = keep_training, keep_last
        self._pending: _Pending | None = None
        self._is_validated = False
        # Data-parallel ranks share the writing of data that they all hold.
        self._strategy = FullyParallelSaveStrategyWrapper(
            InPlaceSaveStrategy("torch_dist", 1, thread_count=FILES_PER_RANK),
            ranks.groups.dp_cp,
            do_cache_distribution=True,
        )

    def save(self, state: RunState, list_content: Callable[[], dict[str, Any]]) -> None:
        """Save a checkpoint, after waiting for one that is still being written.

        Collective: every rank of the world calls it.

        Args:
            state: the run state.
            list_content: function that lists this rank's shards.

        Raises:
            UserError: if the checkpoint cannot be written; earlier checkpoints are not changed.
        """
        self.finish()
        started_s, step = time.perf_counter(), state.iteration
        run_on_main_rank(lambda: self.folders.begin(step))
        with self._abandoning(step), planning_for_threads(), failing_together():
            request = self._plan(step, list_content())
        self._is_validated = True
        self._pending = _Pending(state, ShardWriting(request, self.keep_training), started_s)
        if not self.keep_training:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._pending is not None and not self._pending.writing.is_done

    @property
    def has_unpublished(self) -> bool:
        """Whether a checkpoint waits for :meth:`finish`; the same on every rank."""
        return self._pending is not None

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and publish it.

        Collective: every rank of the world calls it.

        Raises:
            UserError: if the checkpoint cannot be written; earlier checkpoints are not changed.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._abandoning(pending.state.iteration):
            with failing_together():
                written = pending.writing.finish()
            digests = {name: digest for part in every_rank(written) for name, digest in part.items()}
            run_on_main_rank(lambda: self.publish(pending, digests))

    def _plan(self, step: int, content: dict[str, Any]) -> AsyncRequest:
        """Write the common state and plan the writing of the shards, to which then only the plan holds references."""
        request = dist_checkpointing.save(
            content,
            str(self.folders.partial(step)),
            self._strategy,
            # The ranks write the same shards each time, so one validation is enough.
            validate_access_integrity=not self._is_validated,
            async_sharded_save=True,
            content_metadata=CONTENT_METADATA,
            **save_settings(),
        )
        run_on_main_rank(lambda: self._write_common_state(step, content))
        return request

    def _write_common_state(self, step: int, content: dict[str, Any]) -> None:
        folder = self.folders.partial(step)
        with writing(folder / COMMON_STATE):
            write_common_state(folder, content, CONTENT_METADATA)

    def publish(self, pending: _Pending, digests: dict[str, str]) -> None:
        """Complete a written checkpoint, move it into place and delete those that are not kept; on the main rank."""
        step = pending.state.iteration
        folder = self.folders.partial(step)
        with writing(folder):
            write_run_state(folder, pending.state, self._config_yaml)
            write_checksums(folder, digests)
            size = sum(path.stat().st_size for path in folder.iterdir())
        later = self.folders.publish(step)
        seconds = time.perf_counter() - pending.started_s
        logger.info("saved %s: %.1f MB in %.1f s", self.folders.of(step), size / 1e6, seconds)
        if later:
            logger.info("renamed the checkpoints of later steps %s to .replaced: the run has left their course", later)
        self._retire()

    def _retire(self) -> None:
        """Delete the oldest checkpoints that need not be kept; the newest is the one just published."""
        if self._keep_last is None:
            return
        passing = []
        for step in self.folders.steps():
            # A checkpoint that cannot be read may not be this run's, so it is not deleted.
            with contextlib.suppress(UserError):
                if not read_run_state(self.folders.of(step)).is_permanent:
                    passing.append(step)
        for step in passing[: -self._keep_last]:
            self.folders.remove(step)

    @contextlib.contextmanager
    def _abandoning(self, step: int) -> Iterator[None]:
        """After a failure, delete the partially written checkpoint and raise a one-line error."""
        try:
            yield
        except (CheckpointException, OSError, UserError) as error:
            if self._ranks.is_main:
                self.folders.abandon(step)
            raise _one_line(error, self.folders.of(step)) from error


def _one_line(error: BaseException, folder: Path) -> UserError:
    if isinstance(error, UserError):
        return error
    # Only the main rank knows which ranks failed and why.
    failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
    reasons = [
        f"rank {rank}: {str(failure).removeprefix('Worker failure: ')}"
        for rank, (failure, _) in sorted(failures.items())
    ]
    # An error other than CheckpointException may have occurred on this rank alone.
    return UserError(f"--save: {folder} cannot be written: {'; '.join(reasons)}", own_rank=isinstance(error, OSError))
