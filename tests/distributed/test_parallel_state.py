import pytest
import torch.distributed as dist

from megatron_tst.config import DivergedError, StoppedInSetUp, UserError
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


def fail_on_the_main_rank(error):
    def fail():
        raise error

    dist.init_process_group("gloo")
    try:
        run_on_main_rank(fail)
    except (UserError, StoppedInSetUp) as raised:
        return type(raised), str(raised), raised.exit_code
    return None


@pytest.mark.distributed
@pytest.mark.parametrize("error", [StoppedInSetUp("stopped by SIGTERM"), DivergedError("not finite")], ids=repr)
def test_an_error_of_the_main_rank_reaches_all_ranks_with_its_class_and_exit_code(error):
    assert run_distributed(fail_on_the_main_rank, 2, error) == [(type(error), str(error), error.exit_code)] * 2
    assert error.exit_code != UserError.exit_code


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
