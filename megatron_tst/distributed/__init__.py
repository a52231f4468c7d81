"""The device and the ranks of a run: process groups, rank 0 and the others, rendezvous, signals, RNG state."""

from megatron_tst.distributed.device import Device, enter_device
from megatron_tst.distributed.ranks import (
    ParallelSizes,
    Ranks,
    any_rank,
    every_rank,
    join_ranks,
    leave_ranks,
    main_rank_alone,
    this_rank,
)
from megatron_tst.distributed.rng_state import seed_everything

__all__ = [
    "Device",
    "ParallelSizes",
    "Ranks",
    "any_rank",
    "enter_device",
    "every_rank",
    "join_ranks",
    "leave_ranks",
    "main_rank_alone",
    "seed_everything",
    "this_rank",
]
