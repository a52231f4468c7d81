import pytest
import torch.distributed as dist

from megatron_tst.config import StoppedInSetUp, UserError
from megatron_tst.distributed import ParallelSizes, init_parallel_state, run_on_main_rank, seed_everything
from tests.distributed.launch import run_distributed


def test_one_process_is_a_world_of_its_own(rank):
    assert (rank.rank, rank.world_size, rank.tp_size, rank.dp_size) == (0, 1, 1, 1)
    assert rank.is_main and rank.owns_text and rank.last_stage_rank == 0


@pytest.mark.parametrize("size", ["tensor", "pipeline"])
def test_layout_that_does_not_fit_the_world_is_refused(size):
    with pytest.raises(UserError, match=f"--{size}-model-parallel-size 2"):
        init_parallel_state(ParallelSizes(**{f"{size}_model_parallel_size": 2}))


def test_error_on_the_main_rank_reaches_the_caller(rank):
    def fail():
        raise UserError("--flag 1: wrong")

    with pytest.raises(UserError, match="--flag 1: wrong"):
        run_on_main_rank(fail)
    assert run_on_main_rank(dist.get_rank) == 0


def stop_the_main_rank():
    def stop():
        if dist.get_rank() == 0:
            raise StoppedInSetUp("stopped by SIGTERM")

    dist.init_process_group("gloo")
    try:
        run_on_main_rank(stop)
    except StoppedInSetUp as stopped:
        return str(stopped)
    return None


@pytest.mark.distributed
def test_signal_to_the_main_rank_stops_all_ranks():
    assert run_distributed(stop_the_main_rank, 2) == ["stopped by SIGTERM"] * 2


def test_equal_seeds_give_equal_numbers(rank):
    import random

    import numpy
    import torch

    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    seed_everything(11)
    first = draw()
    seed_everything(11)
    assert draw() == first
    seed_everything(12)
    assert draw() != first
