"""Where a run lives: CUDA or the CPU stand-in, process groups, seeds, and which optional libraries are used."""

from megatron_tst.platform.device import Device, enter_device
from megatron_tst.platform.libraries import Libraries, find_libraries
from megatron_tst.platform.ranks import (
    ParallelSizes,
    Ranks,
    any_rank,
    every_rank,
    join_ranks,
    leave_ranks,
    main_rank_alone,
)
from megatron_tst.platform.seeds import seed_everything

__all__ = [
    "Device",
    "Libraries",
    "ParallelSizes",
    "Ranks",
    "any_rank",
    "enter_device",
    "every_rank",
    "find_libraries",
    "join_ranks",
    "leave_ranks",
    "main_rank_alone",
    "seed_everything",
]
