"""The tensors of a checkpoint: model, optimizer and generators, under the names and shapes that Megatron-LM gives them.

What is listed here to be saved is listed again to be loaded, by ranks in another layout if need be.
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

FORMAT_VERSION = 3.0  # Megatron-LM's number for the order of the query, key and value rows
# How optimizer state is laid out: like the parameters, so that any layout can load it.
CONTENT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
# What torch and megatron-core keep in a parameter group that is state; all else there is settings of this run.
_GROUP_STATE = ("params", "step")


@dataclass(frozen=True)
class TrainState:
    """What training changes.

    Attributes:
        chunks: this rank's model chunks, wrapped for data parallelism.
        optimizer: over them.
        scheduler: of its learning rate.
        ranks: this rank's place.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    ranks: ParallelState


@torch.no_grad()
def gather_weights(train_state: TrainState) -> None:
    """Complete this rank's weights, for whoever reads them outside a forward pass.

    With ``--overlap-param-gather`` a step leaves each rank the new weights of its own shard of the optimizer alone; the
    others' follow in the next forward pass.

    Collective: every rank of the world calls it.
    """
    for chunk in train_state.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def list_model(train_state: TrainState) -> dict[str, Any]:
    """Return the shards of this rank's weights: ``model``, or ``model0`` and on where the pipeline is interleaved."""
    metadata = {**CONTENT_METADATA, "dp_cp_group": train_state.ranks.groups.dp_cp}
    shards = [chunk.module.sharded_state_dict(metadata=metadata) for chunk in train_state.chunks]
    return {"model": shards[0]} if len(shards) == 1 else {f"model{index}": shard for index, shard in enumerate(shards)}


def list_optimizer(train_state: TrainState, model: dict[str, Any], is_loading: bool) -> Any:
    """Return the shards of this rank's optimizer state.

    Args:
        train_state: what training changes.
        model: as :func:`list_model` returns it.
        is_loading: whether the state is about to be overwritten.
    """
    metadata = {**CONTENT_METADATA, "dp_cp_group": train_state.ranks.groups.dp_cp}
    return train_state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)


def list_rng_states(ranks: ParallelState) -> ShardedObject:
    """Return the states of this rank's generators.

    Data-parallel ranks draw from the same streams, so one of them is enough, unless they hold different experts.
    """
    states = [get_rng_states()]
    place, sizes = (ranks.pp_rank, ranks.tp_rank), (ranks.pp_size, ranks.tp_size)
    group = ranks.groups.dp_cp
    if ranks.ep_size > 1:
        return ShardedObject("rng_state", states, (*sizes, group.size()), (*place, group.rank()), replica_id=0)
    return ShardedObject("rng_state", states, sizes, place, replica_id=group.rank())


def list_all(train_state: TrainState, step: int, model: ModelSettings, samples: int) -> dict[str, Any]:
    """Return all that a checkpoint holds.

    Collective: every rank of the world calls it.

    Args:
        train_state: what training changes.
        step: optimizer steps done.
        model: its shape, for Megatron-LM's ``args``.
        samples: sequences read, likewise.
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
            # Under the names by which Megatron-LM reads them with --use-checkpoint-args.
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
    """Give the model the loaded weights."""
    for index, chunk in enumerate(train_state.chunks):
        weights = loaded["model" if len(train_state.chunks) == 1 else f"model{index}"]
        chunk.module.load_state_dict(weights)


def put_optimizer(train_state: TrainState, shards: Any, own: Any, saved: Any) -> None:
    """Give the optimizer the loaded state; rates, betas and decay stay those of this run.

    How many optimizers megatron-core chains, and so the layout of what is not sharded, depends on the parallel layout:
    of that, the step count alone is taken from the checkpoint.

    Args:
        train_state: what training changes.
        shards: the loaded shards, where :func:`list_optimizer` listed them.
        own: what :func:`without_shards` left of that list.
        saved: what the checkpoint holds of the optimizer beside shards.
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
    """Stands where a shard was listed."""


def without_shards(listed: Any) -> Any:
    """Return a copy of a list of shards and plain values that keeps the values and the places of the shards."""
    if isinstance(listed, ShardedBase):
        return _Shard
    if isinstance(listed, LocalNonpersistentObject):
        return listed.unwrap()
    if isinstance(listed, dict):
        return {name: without_shards(item) for name, item in listed.items()}
    return [without_shards(item) for item in listed] if isinstance(listed, list) else listed


def _filled(own: Any, shards: Any) -> Any:
    """Put loaded shards back into their places."""
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
    """Give an optimizer's state the step count of another's: sharded ones keep it by group, torch's Adam once."""
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
    """Return the first value of that name in nested dicts and lists, or None."""
    if isinstance(state, dict):
        if name in state:
            return state[name]
        state = list(state.values())
    found = (_find(item, name) for item in state) if isinstance(state, list) else ()
    return next((value for value in found if value is not None), None)


def put_rng_states(loaded: list[dict[str, Any]]) -> None:
    """Put this rank's generators back to where they were."""
    set_rng_states(loaded[0])
