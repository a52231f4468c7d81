"""Re-initializes embedding and output layer: the control that shows that superposition also trains the vocabulary.

Shape letters: D hidden, V vocabulary, Vp local vocabulary.
"""

import logging
from collections.abc import Callable

import numpy
import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_tst.checkpoint.content import TrainState
from megatron_tst.megatron_patches.fresh_state import forget_history

logger = logging.getLogger(__name__)

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# Rows are drawn in whole blocks of this size, so a vocabulary padded to another length gets the same numbers.
_ROWS = 1024


@torch.no_grad()
def reinitialize(train_state: TrainState, seed: int, step: int) -> None:
    """Re-initialize word embedding and output layer, as at the start of a run, and reset their optimizer moments.

    The draw depends only on the seed and the step: it is the same on every parallel layout, on every rank that holds a
    copy, and after a resumption. The RNG state of the run does not change. Position embeddings, all other weights and
    their optimizer state do not change either.

    Args:
        train_state: train state of the run.
        seed: seed of the run.
        step: number of optimizer steps done.
    """
    for chunk in train_state.chunks:
        config = get_model_config(chunk)
        for name, weight_VpD in chunk.named_parameters():
            is_head = name.endswith(OUTPUT)
            if not (is_head or name.endswith(EMBEDDING)):
                continue
            # With tied weights, the last pipeline stage holds a copy of the embedding.
            is_embedding = not is_head or getattr(weight_VpD, "shared_embedding", False)
            method = config.embedding_init_method if is_embedding else config.init_method
            _draw(weight_VpD, method, (seed, step, int(is_embedding)), train_state.ranks.tp_rank)
            forget_history(train_state.optimizer, weight_VpD)
    if train_state.ranks.is_main:
        logger.info("embedding and output layer re-initialized after step %d (negative control)", step)


def _draw(weight_VpD: Tensor, init_method: Callable[[Tensor], object], seeds: tuple[int, ...], tp_rank: int) -> None:
    """Fill one rank's rows of a table; the whole table is drawn on the CPU from its first row on."""
    num_rows, width = weight_VpD.shape
    first = tp_rank * num_rows
    state = torch.get_rng_state()
    # torch.manual_seed would also seed the generators of all devices.
    torch.default_generator.manual_seed(int(numpy.random.SeedSequence(seeds).generate_state(1)[0]))
    for start in range(0, first + num_rows, _ROWS):
        block = torch.empty(_ROWS, width)
        init_method(block)
        low, high = max(start, first), min(start + _ROWS, first + num_rows)
        if low < high:
            weight_VpD[low - first : high - first].copy_(block[low - start : high - start])
    torch.set_rng_state(state)
