"""The content of a checkpoint: model, optimizer and RNG state, under the names and with the shapes of Megatron-LM.

The same functions list the shards to save and the shards to load, which may be in another parallel layout.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_tst.config import ModelSettings
from megatron_tst.distributed import ParallelState
from megatron_tst.distributed.rng_state import get_rng_states, set_rng_states

FORMAT_VERSION = 3.0  # Megatron-LM's version number for the order of the query, key and value rows
# Optimizer state is stored like the parameters, so that any parallel layout can load it.
CONTENT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
# The entries of a parameter group that are state; all others are settings of this run.
_GROUP_STATE = ("params", "step")


@dataclass(frozen=True)
class TrainState:
    """The objects whose state training changes.

    Attributes:
        chunks: this rank's model chunks, wrapped for data parallelism.
        optimizer: the optimizer of the chunks' parameters.
        scheduler: the scheduler of the learning rate.
        ranks: the parallel state.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    ranks: ParallelState


@torch.no_grad()
def gather_weights(train_state: TrainState) -> None:
    """Gather this rank's weights, so that they can be read outside a forward pass.

    With ``--overlap-param-gather``, each rank has only the new weights of its own optimizer shard after a step, until
    the next forward pass gathers the others.

    Collective: every rank of the world calls it.
    """
    for chunk in train_state.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def list_model(train_state: TrainState) -> dict[str, Any]:
    """Return the shards of this rank's weights as ``model``, or as ``model0``, ``model1``, ... with interleaving."""
    metadata = {**CONTENT_METADATA, "dp_cp_group": train_state.ranks.groups.dp_cp}
    shards = [chunk.module.sharded_state_dict(metadata=metadata) for chunk in train_state.chunks]
    return {"model": shards[0]} if len(shards) == 1 else {f"model{index}": shard for index, shard in enumerate(shards)}


def list_optimizer(train_state: TrainState, model: dict[str, Any], is_loading: bool) -> Any:
    """Return the shards of this rank's optimizer state.

    Args:
        train_state: the train state.
        model: the model's shards, as :func:`list_model` returns them.
        is_loading: whether the shards are listed in order to load into them.
    """
    metadata = {**CONTENT_METADATA, "dp_cp_group": train_state.ranks.groups.dp_cp}
    return train_state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)


def list_rng_states(ranks: ParallelState) -> ShardedObject:
    """Return the shard of this rank's RNG state.

    Data-parallel ranks have the same RNG state, so only one of them saves it, unless they hold different experts.
    """
    states = [get_rng_states()]
    place, sizes = (ranks.pp_rank, ranks.tp_rank), (ranks.pp_size, ranks.tp_size)
    group = ranks.groups.dp_cp
    if ranks.ep_size > 1:
        return ShardedObject("rng_state", states, (*sizes, group.size()), (*place, group.rank()), replica_id=0)
    return ShardedObject("rng_state", states, sizes, place, replica_id=group.rank())


def list_all(train_state: TrainState, step: int, model: ModelSettings, samples: int) -> dict[str, Any]:
    """Return the complete content of a checkpoint.

    Collective: every rank of the world calls it.

    Args:
        train_state: the train state.
        step: number of completed optimizer steps.
        model: the model settings, for Megatron-LM's ``args``.
        samples: number of sequences read, for Megatron-LM's ``args``.
    """
    gather_weights(train_state)
    shards, ranks = list_model(train_state), train_state.ranks
    return {
        **shards,
        "optimizer": list_optimizer(train_state, shards, is_loading=False),
        "opt_param_scheduler": train_state.scheduler.state_dict(),
        "rng_state": list_rng_states(ranks),
        "iteration": step,
        "checkpoint_version": FORMAT_VERSION,
        "args": Namespace(
            **asdict(model),
            # Megatron-LM reads these names with --use-checkpoint-args.
            layernorm_epsilon=model.norm_epsilon,
            add_bias_linear=not model.disable_bias_linear,
            tensor_model_parallel_size=ranks.tp_size,
            pipeline_model_parallel_size=ranks.pp_size,
            consumed_train_samples=samples,
            consumed_valid_samples=0,
            skipped_train_samples=0,
        ),
    }


def put_model(train_state: TrainState, loaded: dict[str, Any]) -> None:
    """Copy the loaded weights into the model."""
    for index, chunk in enumerate(train_state.chunks):
        weights = loaded["model" if len(train_state.chunks) == 1 else f"model{index}"]
        chunk.module.load_state_dict(weights)


def put_optimizer(train_state: TrainState, shards: Any, own: Any, saved: Any) -> None:
    """Load state into the optimizer; learning rates, betas and weight decay remain those of this run.

    The number of optimizers that megatron-core chains, and with it the structure of the values that are not sharded,
    depends on the parallel layout. Of these values, only the step count is taken from the checkpoint.

    Args:
        train_state: the train state.
        shards: the loaded shards, in the structure that :func:`list_optimizer` returned.
        own: the result of :func:`without_shards` for that structure.
        saved: the checkpoint's optimizer values that are not sharded.
    """
    groups = train_state.optimizer.param_groups
    settings = [{name: value for name, value in group.items() if name not in _GROUP_STATE} for group in groups]
    state = _filled(own, shards)
    _set_step_counts(state, saved)
    with torch.no_grad():
        train_state.optimizer.load_state_dict(state)
    for group, setting in zip(train_state.optimizer.param_groups, settings, strict=True):
        group.update(setting)


class _Shard:
    """Marks the place of a shard."""


def without_shards(listed: Any) -> Any:
    """Return a copy of a structure of shards and plain values in which each shard is replaced by a mark."""
    if isinstance(listed, ShardedBase):
        return _Shard
    if isinstance(listed, LocalNonpersistentObject):
        return listed.unwrap()
    if isinstance(listed, dict):
        return {name: without_shards(item) for name, item in listed.items()}
    return [without_shards(item) for item in listed] if isinstance(listed, list) else listed


def _filled(own: Any, shards: Any) -> Any:
    """Replace the marks by loaded shards."""
    if own is _Shard:
        return shards
    if isinstance(own, dict):
        inner = shards if isinstance(shards, dict) else {}
        return {name: _filled(item, inner.get(name)) for name, item in own.items()}
    if isinstance(own, list):
        parts = shards if isinstance(shards, list) else [None] * len(own)
        return [_filled(item, part) for item, part in zip(own, parts, strict=True)]
    return own


def _set_step_counts(state: Any, saved: Any) -> None:
    """Set the step count to the saved one, which sharded optimizers keep per group and torch's Adam once."""
    by_group, common = _find(saved, "step"), _find(saved, "common_step")
    for part in _with_groups(state):
        for group in part["param_groups"]:
            if by_group is not None:
                group["step"] = by_group
        if "state" in part and common is not None:
            part["state"]["common_step"] = common


def _with_groups(state: Any) -> Iterator[dict[str, Any]]:
    if isinstance(state, dict):
        if "param_groups" in state:
            yield state
        for item in state.values():
            yield from _with_groups(item)


def _find(state: Any, name: str) -> Any:
    """Return the first value under a name in nested dicts and lists, or None."""
    if isinstance(state, dict):
        if name in state:
            return state[name]
        state = list(state.values())
    found = (_find(item, name) for item in state) if isinstance(state, list) else ()
    return next((value for value in found if value is not None), None)


def put_rng_states(loaded: list[dict[str, Any]]) -> None:
    """Restore this rank's RNG state."""
    set_rng_states(loaded[0])
