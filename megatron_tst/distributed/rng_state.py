"""Seed, read and restore the RNG state of every generator that a run uses."""

import random
from typing import Any

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and megatron-core's tracker as Megatron-LM's ``--seed`` does.

    Seeds of successive pipeline stages differ by 100; data-parallel ranks have the same seed.
    """
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    numpy.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def get_rng_states() -> dict[str, Any]:
    """Return the states of this rank's generators by the names that Megatron-LM gives them."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": get_cuda_rng_tracker().get_states(),
    }


def set_rng_states(states: dict[str, Any]) -> None:
    """Restore the states of this rank's generators that :func:`get_rng_states` returned."""
    random.setstate(states["random_rng_state"])
    numpy.random.set_state(states["np_rng_state"])
    torch.set_rng_state(states["torch_rng_state"])
    torch.cuda.set_rng_state(states["cuda_rng_state"])
    get_cuda_rng_tracker().set_states(states["rng_tracker_states"])
