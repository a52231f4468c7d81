import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import run_distributed

pytestmark = pytest.mark.distributed


def add_ranks(extra):
    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank() + extra)
    dist.all_reduce(total)
    return int(total), dist.get_rank()


def fail_on_one():
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise KeyError("a telling message")
    dist.barrier()


def die_on_one():
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def never_end():
    time.sleep(3600)


def test_results_of_all_ranks_are_returned():
    assert run_distributed(add_ranks, 3, 10) == [(33, 0), (33, 1), (33, 2)]


def test_error_has_the_traceback_of_the_failing_rank():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed.*fail_on_one.*a telling message"):
        run_distributed(fail_on_one, 2)


def test_rank_that_dies_fails_the_call():
    with pytest.raises(AssertionError, match=r"rank \d of 2 failed"):
        run_distributed(die_on_one, 2)


def test_ranks_that_never_end_fail_the_call():
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 still ran after 2 s"):
        run_distributed(never_end, 2, timeout_s=2)
