"""Load a checkpoint: every rank reads its own shards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_tst.checkpoint.content import (
    TrainState,
    list_model,
    list_optimizer,
    list_rng_states,
    put_model,
    put_optimizer,
    put_rng_states,
    without_shards,
)
from megatron_tst.checkpoint.saved_checkpoint import SavedCheckpoint
from megatron_tst.config import UserError
from megatron_tst.distributed import ParallelState, every_rank
from megatron_tst.megatron_patches.common_state import read_common_state
from megatron_tst.megatron_patches.safe_checkpoint import read_metadata, safe_loading
from megatron_tst.megatron_patches.versions import reads_alone

_Result = TypeVar("_Result")


def load_checkpoint(
    found: SavedCheckpoint, train_state: TrainState, *, with_optimizer: bool, with_rng_states: bool
) -> None:
    """Load a checkpoint into a model, its optimizer and this rank's RNG state.

    Collective: every rank of the world calls it.

    Args:
        found: the checkpoint to load.
        train_state: the train state into which it is loaded.
        with_optimizer: whether to load optimizer state; if not, the optimizer starts from the loaded weights.
        with_rng_states: whether to load the RNG state, which is skipped if the parallel layout differs.

    Raises:
        UserError: on every rank, if the checkpoint holds another model, or if one rank cannot read its part.
    """
    model = list_model(train_state)
    wanted: dict[str, Any] = dict(model)
    absent = _take_absent_states(model, _together(lambda: _read_contents(found.folder), found.folder))
    if with_optimizer:
        # The shards have their own name, because the checkpoint's plain values are loaded under the name "optimizer".
        wanted["optimizer_shards"] = list_optimizer(train_state, model, is_loading=True)
        own = without_shards(wanted["optimizer_shards"])
    with_rng_states = with_rng_states and found.state is not None and found.state.layout == train_state.ranks.layout
    if with_rng_states:
        wanted["rng_state"] = list_rng_states(train_state.ranks)
    try:
        with safe_loading():
            loaded = dist_checkpointing.load(wanted, str(found.folder), shared_reading(train_state.ranks))
    except (CheckpointingException, CheckpointException, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"--load {found.folder}: cannot be loaded: {_reason(error)}", own_rank=True) from error
    for part, names in absent.items():
        loaded[part].update(dict.fromkeys(names))
    put_model(train_state, loaded)
    if with_optimizer:
        put_optimizer(train_state, loaded["optimizer_shards"], own, loaded["optimizer"])
    else:
        train_state.optimizer.reload_model_params()
    if with_rng_states:
        put_rng_states(loaded["rng_state"])


def shared_reading(ranks: ParallelState) -> FullyParallelLoadStrategyWrapper:
    """Return a strategy in which data-parallel ranks share the reading of data that they all need.

    Ranks exchange tensors one at a time by broadcast. The other algorithms hold all tensors twice, or gather tensors of
    unequal sizes, which gloo does not support.
    """
    strategy = LoadTogether()
    return FullyParallelLoadStrategyWrapper(strategy, ranks.groups.dp_cp, exchange_algo="broadcast")


class LoadTogether(TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """Reads a rank's part, and fails on every rank if one rank cannot read its own.

    From 0.17 on, a rank of megatron-core does not tell the others that it failed, and they wait for the data it read.
    """

    def load(self, shards: Any, folder: Path, *arguments: Any) -> Any:
        """Read this rank's shards. Collective: every rank of the world calls it."""
        return _together(lambda: super(LoadTogether, self).load(shards, folder, *arguments), folder)


def _together(read: Callable[[], _Result], folder: Path) -> _Result:
    """Return what ``read`` returns on this rank, or fail on every rank.

    Collective: every rank of the world calls it.

    Raises:
        UserError: on every rank, if ``read`` fails on any rank.
    """
    result, failure = None, None
    try:
        result = read()
    except (Exception, CheckpointException) as error:  # no error may leave the other ranks waiting
        failure = error
    failures = {rank: reason for found in every_rank(_failures(failure)) for rank, reason in found.items()}
    if failures:
        rank, reason = min(failures.items())
        whose = f"rank {rank}: " if dist.get_world_size() > 1 else ""
        raise UserError(f"--load {folder}: cannot be loaded: {whose}{reason}") from failure
    return cast(_Result, result)


def _failures(error: BaseException | None) -> dict[int, str]:
    """Return the ranks that are known here to have failed, with their reasons."""
    if error is None:
        return {}
    if isinstance(error, CheckpointException) and not reads_alone():
        return {rank: _reason(failure) for rank, (failure, _) in error.failures.items()}
    return {dist.get_rank(): _reason(error)}


def _read_contents(folder: Path) -> Metadata:
    """Read the files that every rank reads by itself before the first collective; return the table of contents."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise CheckpointingException("it is not a distributed checkpoint")
    metadata = read_metadata(folder)
    read_common_state(folder, metadata)
    return metadata


def _take_absent_states(model: dict[str, Any], metadata: Metadata) -> dict[str, list[str]]:
    """Remove from the shards to load those non-tensor states of modules that the checkpoint lacks; return their names.

    Transformer Engine's attention has such a state, which is empty without FP8; checkpoints of other layers have none.
    """
    known = metadata.state_dict_metadata
    absent = {}
    for part, entries in model.items():
        absent[part] = [
            name
            for name, entry in entries.items()
            if isinstance(entry, ShardedObject) and entry.unique_key not in known
        ]
        for name in absent[part]:
            del entries[name]
    return absent


def _reason(error: BaseException) -> str:
    """Return the first line of an error's message."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
