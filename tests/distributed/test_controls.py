"""Negative controls of the comparison of layouts: deliberately wrong reductions, labels and attention."""

import pytest
import torch.distributed as dist

from megatron_tst.data import batches
from megatron_tst.model import attention
from megatron_tst.model.attention import ScaledDotProductAttention
from megatron_tst.model.embedding import VocabParallelBagEmbedding
from megatron_tst.training.step import Stepper
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import train_layout
from tests.distributed.test_layouts import LAYOUTS, assert_same_training, setup  # noqa: F401

pytestmark = pytest.mark.distributed


def with_local_weight(argv, initial):
    """Divide the loss on each rank by its own weight, which gives a mean of means."""

    def local_weight(self, made):
        return sum(batch.weight for batch in made) * self._ranks.dp_size

    Stepper.global_weight = local_weight
    return train_layout(argv, initial)


def with_unreduced_bags(argv, initial):
    """Do not reduce the sums of bags over the shards of the vocabulary."""
    from megatron_tst.model import embedding

    embedding.reduce_from_tensor_model_parallel_region = lambda tensor, group: tensor
    assert VocabParallelBagEmbedding.forward.__globals__ is vars(embedding)
    return train_layout(argv, initial)


def with_shifted_labels(argv, initial):
    """Shift the labels of one data-parallel rank by one."""
    fold_labels = batches.fold_labels

    def shifted(labels, *args):
        return fold_labels(labels.roll(dist.get_rank(), dims=1), *args)

    batches.fold_labels = shifted
    return train_layout(argv, initial)


def with_own_keys_alone(argv, initial):
    """Let each context-parallel rank attend only to its own part of the sequence."""
    ScaledDotProductAttention.attend_in_context = ScaledDotProductAttention.attend
    return train_layout(argv, initial)


def with_keys_in_plain_order(argv, initial):
    """Apply the causal mask as if the context-parallel ranks' parts followed each other in the text."""
    attention.in_text_order = lambda gathered, cp_size: gathered
    return train_layout(argv, initial)


BROKEN = [
    ("dp2", with_local_weight),
    ("tp2", with_unreduced_bags),
    ("dp2", with_shifted_labels),
    ("cp2", with_own_keys_alone),
    ("cp2", with_keys_in_plain_order),
]


@pytest.mark.parametrize(("name", "broken"), BROKEN)
def test_comparison_fails_for_a_broken_layout(setup, name, broken):  # noqa: F811
    argv, one_rank = setup
    model, world_size, flags = LAYOUTS[name]
    initial, alone = one_rank(model)
    ranks = run_distributed(broken, world_size, argv(broken.__name__, model, flags), initial)
    with pytest.raises(AssertionError):
        assert_same_training(alone, ranks)
