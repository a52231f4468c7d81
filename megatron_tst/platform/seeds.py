"""Seeds of every generator a run draws from."""

import random

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and megatron-core's tracker as Megatron-LM's ``--seed`` does.

    Pipeline stages draw from different streams (100 apart); data-parallel ranks from the same.
    """
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    numpy.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
