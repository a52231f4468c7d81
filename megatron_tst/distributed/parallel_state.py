"""Processes and their groups: who this process is, and with whom it shares work."""

import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tst.config import StoppedInSetUp, UserError
from megatron_tst.distributed.device import enter_device

_Result = TypeVar("_Result")
_is_in_main_rank_alone = ContextVar("is_in_main_rank_alone", default=False)


@dataclass(frozen=True)
class ParallelSizes:
    """How many ranks share a model in each way; the rest of the world is data parallel.

    Attributes are Megatron-LM's flags of the same names.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1


@dataclass(frozen=True)
class ParallelState:
    """This process's place in the grid of ranks.

    Attributes:
        rank: 0-based number in the world.
        world_size: processes in all.
        tp_rank: place among the ranks that share each tensor.
        tp_size: how many they are.
        dp_rank: place among the ranks that read different sequences.
        dp_size: how many they are.
        cp_rank: place among the ranks that share each sequence.
        cp_size: how many they are.
        pp_rank: number of this pipeline stage.
        pp_size: how many they are.
        ep_size: ranks that share the experts.
        is_first_stage: whether this pipeline stage embeds tokens.
        is_last_stage: whether this pipeline stage computes the loss.
        last_stage_rank: global rank of the loss-computing stage of this pipeline.
        groups: megatron-core's process groups.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    pp_rank: int
    pp_size: int
    ep_size: int
    is_first_stage: bool
    is_last_stage: bool
    last_stage_rank: int
    groups: ProcessGroupCollection

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the run: writes its files and its lines."""
        return self.rank == 0

    @property
    def layout(self) -> dict[str, int]:
        """Sizes of the parallel layout."""
        return {
            "tp": self.tp_size, "pp": self.pp_size, "cp": self.cp_size, "dp": self.dp_size, "ep": self.ep_size,
        }  # fmt: skip

    @property
    def owns_text(self) -> bool:
        """Whether this pipeline stage needs text: the first embeds it, the last predicts it."""
        return self.is_first_stage or self.is_last_stage


def init_parallel_state(sizes: ParallelSizes, timeout_minutes: int = 30) -> ParallelState:
    """Join the other processes, named by torchrun's environment, and build megatron-core's groups.

    Without torchrun this is a world of one process. Collective: every rank of the world calls it.

    Args:
        sizes: the parallel layout; its product must divide the world size.
        timeout_minutes: how long a collective may wait for a missing rank.

    Raises:
        UserError: if the layout does not fit the world.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model_ranks = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size
    if world_size % model_ranks:
        raise UserError(
            f"{world_size} ranks cannot hold --tensor-model-parallel-size {sizes.tensor_model_parallel_size} x "
            f"--pipeline-model-parallel-size {sizes.pipeline_model_parallel_size} x "
            f"--context-parallel-size {sizes.context_parallel_size}: the world size must be a multiple of {model_ranks}"
        )
    device = enter_device()
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(device.backend, timeout=timeout)
    else:
        dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor_model_parallel_size,
        pipeline_model_parallel_size=sizes.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline_model_parallel_size,
        context_parallel_size=sizes.context_parallel_size,
        expert_model_parallel_size=sizes.expert_model_parallel_size,
        # With etp > 1 the dispatcher needs an uneven all-gather, which gloo lacks.
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=timeout_minutes,
    )
    return get_parallel_state()


def get_parallel_state() -> ParallelState:
    """Return this process's place in the groups that :func:`init_parallel_state` has built."""
    return ParallelState(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        is_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        last_stage_rank=parallel_state.get_pipeline_model_parallel_last_rank(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def destroy_parallel_state() -> None:
    """Leave all process groups. Collective: every rank of the world calls it."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def run_on_main_rank(function: Callable[[], _Result]) -> _Result:
    """Call ``function`` on the main rank and return its result, which is pickled, on every rank.

    Collective: every rank of the world calls it.

    Raises:
        UserError, StoppedInSetUp: on every rank, if the main rank's call raised one: no rank is left waiting.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            entered = _is_in_main_rank_alone.set(True)
            try:
                answer[1] = function()
            finally:
                _is_in_main_rank_alone.reset(entered)
        except (UserError, StoppedInSetUp) as error:
            answer[0] = error
    dist.broadcast_object_list(answer)
    failure, result = answer
    if failure is not None:
        raise failure
    return cast(_Result, result)


def is_alone() -> bool:
    """Return whether an error raised here and now leaves no other rank in a collective that this one never joins."""
    return not dist.is_initialized() or dist.get_world_size() == 1 or _is_in_main_rank_alone.get()


def any_rank(*facts: bool) -> list[bool]:
    """Return for each fact whether it holds on at least one rank.

    Collective: every rank of the world calls it, with as many facts.
    """
    if dist.get_world_size() == 1:
        return list(facts)
    votes = torch.tensor(facts, dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def every_rank(value: _Result) -> list[_Result]:
    """Return the values of all ranks, in their order.

    Collective: every rank of the world calls it.
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
