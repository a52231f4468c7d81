"""Parallel state: the process groups, this process's place in them, and helpers for collective calls."""

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
    """Sizes of the model-parallel dimensions; the remaining factor of the world size is data parallelism.

    The attributes have the names and meanings of Megatron-LM's flags.
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
        world_size: number of processes.
        tp_rank: rank in the tensor-parallel group, which shares each tensor.
        tp_size: size of the tensor-parallel group.
        dp_rank: rank in the data-parallel group, whose members read different sequences.
        dp_size: size of the data-parallel group.
        cp_rank: rank in the context-parallel group, which shares each sequence.
        cp_size: size of the context-parallel group.
        pp_rank: index of this pipeline stage.
        pp_size: number of pipeline stages.
        ep_size: size of the expert-parallel group, which shares the experts.
        is_first_stage: whether this pipeline stage embeds tokens.
        is_last_stage: whether this pipeline stage computes the loss.
        last_stage_rank: global rank of the last stage of this pipeline.
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
        """Whether this process is the main rank, which writes the run's files and log lines."""
        return self.rank == 0

    @property
    def layout(self) -> dict[str, int]:
        """Sizes of the parallel layout, by short name."""
        return {
            "tp": self.tp_size, "pp": self.pp_size, "cp": self.cp_size, "dp": self.dp_size, "ep": self.ep_size,
        }  # fmt: skip

    @property
    def owns_text(self) -> bool:
        """Whether this pipeline stage needs the text: the first stage embeds it, and the last predicts it."""
        return self.is_first_stage or self.is_last_stage


def init_parallel_state(sizes: ParallelSizes, timeout_minutes: int = 30) -> ParallelState:
    """Join the other processes, which torchrun's environment describes, and build megatron-core's groups.

    Without torchrun the world is one process. Collective: every rank of the world calls it.

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
        # With expert tensor parallelism the dispatcher needs an uneven all-gather, which gloo lacks.
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
        UserError, StoppedInSetUp: on every rank if the main rank's call raised one, so that no rank is left waiting.
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
    """Return whether this rank can raise an error now without leaving other ranks waiting in a collective."""
    return not dist.is_initialized() or dist.get_world_size() == 1 or _is_in_main_rank_alone.get()


def any_rank(*facts: bool) -> list[bool]:
    """Return, for each fact, whether it is true on at least one rank.

    Collective: every rank of the world calls it with the same number of facts.
    """
    if dist.get_world_size() == 1:
        return list(facts)
    votes = torch.tensor(facts, dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def every_rank(value: _Result) -> list[_Result]:
    """Return the values of all ranks, in rank order.

    Collective: every rank of the world calls it.
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
