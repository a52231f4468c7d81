"""Output layer and loss in one, over tensor-parallel ranks, sequence parallelism and pipeline stages."""

import pytest
import torch

from megatron_tst.distributed import ParallelSizes, init_parallel_state
from megatron_tst.model import linear_loss, vocab_parallel_linear_multi_hot_cross_entropy
from megatron_tst.shape import loss_chunks
from megatron_tst.superposition import bag_weights
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import train_layout
from tests.distributed.test_layouts import (  # noqa: F401
    DENSE,
    LAYOUTS,
    MOE,
    RECOMPUTE_ALL,
    TIED,
    assert_same_training,
    setup,
)
from tests.distributed.test_tensor_parallel import collectives
from tests.ops import OperationLog
from tests.reference import edge_targets, loss_and_gradient

pytestmark = pytest.mark.distributed
WORLD, VOCAB, WIDTH = 2, 40, 16


def lose(hidden_LBD, weight_VD, targets, weights, is_sequence_parallel, upstream):
    ranks = init_parallel_state(ParallelSizes(tensor_model_parallel_size=WORLD))
    loss_chunks.SMALLEST_CHUNK = 5
    hidden = hidden_LBD.chunk(WORLD)[ranks.tp_rank] if is_sequence_parallel else hidden_LBD
    hidden = hidden.clone().requires_grad_()
    weight = weight_VD.chunk(WORLD)[ranks.tp_rank].clone().requires_grad_()
    with OperationLog() as log:
        loss, row_weight = vocab_parallel_linear_multi_hot_cross_entropy(
            hidden, weight, targets, weights, ranks.groups.tp, sequence_parallel=is_sequence_parallel
        )
    (loss * upstream).sum().backward()
    return loss.detach(), row_weight, hidden.grad, weight.grad, collectives(log)


@pytest.mark.parametrize("is_sequence_parallel", [False, True])
@pytest.mark.parametrize("bag_size", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_shards_of_the_weight(dtype, bag_size, is_sequence_parallel):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*size, generator=generator).to(dtype) for size in ((6, 2, WIDTH), (VOCAB, WIDTH)))
    targets, weights = edge_targets((2, 6), VOCAB, bag_size), bag_weights("power_law", bag_size)
    upstream = torch.rand(2, 6, generator=generator)
    ranks = run_distributed(lose, WORLD, hidden, weight, targets, weights, is_sequence_parallel, upstream)
    logits = (hidden @ weight.t()).transpose(0, 1)
    wanted_loss, wanted_weight, at_logits = loss_and_gradient(logits, targets, weights)
    at_logits = (at_logits * upstream.double().unsqueeze(-1)).transpose(0, 1).to(dtype).double()
    wanted_hidden = at_logits @ weight.double()
    wanted_gradient = at_logits.flatten(0, 1).t() @ hidden.double().flatten(0, 1)
    # In bfloat16 each rank's part of the hidden states' gradient is rounded, and so is their sum.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    for loss, row_weight, *_, sent in ranks:
        torch.testing.assert_close(loss.double(), wanted_loss, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(row_weight.double(), wanted_weight, rtol=1e-6, atol=1e-7)
        # One for each of three chunks, and with sequence parallelism one for the hidden states.
        assert sent == {"allgather_": 3} | ({"_allgather_base_": 1} if is_sequence_parallel else {})
    found_hidden = torch.cat([rank[2] for rank in ranks]) if is_sequence_parallel else ranks[0][2]
    found_gradient = torch.cat([rank[3] for rank in ranks])
    assert (found_hidden.double() - wanted_hidden).abs().max() <= 2 * tolerance * wanted_hidden.abs().max()
    assert (found_gradient.double() - wanted_gradient).abs().max() <= tolerance * wanted_gradient.abs().max()


def train_linear(argv, initial):
    loss_chunks.SMALLEST_CHUNK = 24
    return train_layout([*argv, "--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "linear"], initial)


CASES = [
    ("tp2", ""),
    ("tp2-sp", ""),
    ("pp2-tied", ""),
    *(
        pytest.param(*case, marks=pytest.mark.long)
        for case in [
            ("tp2-tied", ""),
            ("tp2-sp", RECOMPUTE_ALL),
            ("pp2", ""),
            ("pp2-interleaved", ""),
            ("dp2-distributed-optimizer", "--overlap-grad-reduce --overlap-param-gather"),
            ("tp2-sp-experts", ""),
            ("cp2", ""),
            ("tp2-sp-pp2-ep2", ""),
        ]
    ),
]


@pytest.mark.parametrize(("name", "extra"), CASES)
def test_a_run_with_it_is_the_run_through_native(setup, name, extra):  # noqa: F811
    argv, one_rank = setup
    model, world_size, flags = LAYOUTS[name]
    initial, alone = one_rank(model)
    label = f"linear-{name}{len(extra)}"
    assert_same_training(
        alone, run_distributed(train_linear, world_size, argv(label, model, f"{flags} {extra}"), initial)
    )


def train_unreduced(argv, initial):
    linear_loss.copy_to_tensor_model_parallel_region = lambda hidden, group: hidden
    return train_linear(argv, initial)


def test_unreduced_gradients_of_hidden_states_are_told_apart(setup):  # noqa: F811
    argv, one_rank = setup
    model, world_size, flags = LAYOUTS["tp2"]
    initial, alone = one_rank(model)
    ranks = run_distributed(train_unreduced, world_size, argv("linear-unreduced", model, flags), initial)
    with pytest.raises(AssertionError):
        assert_same_training(alone, ranks)
