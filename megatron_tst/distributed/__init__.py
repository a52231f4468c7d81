"""Device and ranks of a run: process groups, rank-0 helpers, rendezvous, signals, RNG state."""

from megatron_tst.distributed.device import Device, enter_device
from megatron_tst.distributed.parallel_state import (
    ParallelSizes,
    ParallelState,
    any_rank,
    destroy_parallel_state,
    every_rank,
    get_parallel_state,
    init_parallel_state,
    run_on_main_rank,
)
from megatron_tst.distributed.rng_state import seed_everything

__all__ = [
    "Device",
    "ParallelSizes",
    "ParallelState",
    "any_rank",
    "destroy_parallel_state",
    "enter_device",
    "every_rank",
    "get_parallel_state",
    "init_parallel_state",
    "run_on_main_rank",
    "seed_everything",
]
