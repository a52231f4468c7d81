"""The loss computed by a fused kernel under pipeline schedules, recomputation and tensor parallelism."""

import pytest
import torch

from megatron_tst.distributed import ParallelSizes, init_parallel_state
from megatron_tst.model import build, vocab_parallel_multi_hot_cross_entropy
from megatron_tst.model import loss as loss_module
from megatron_tst.model.te_loss import adapt_kernel
from megatron_tst.superposition import bag_weights
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import train_layout
from tests.distributed.test_layouts import DENSE, LAYOUTS, RECOMPUTE_ALL, assert_same_training, setup  # noqa: F401
from tests.model.kernels import STAND_INS
from tests.reference import edge_targets, loss_and_gradient

pytestmark = pytest.mark.distributed
WORLD, VOCAB = 2, 40
ONE_ROUNDING = 2**-8  # relative rounding error of bfloat16; versions up to 2.17 round a gradient twice


def lose(behaviour, logits_LBV, targets, weights):
    ranks = init_parallel_state(ParallelSizes(tensor_model_parallel_size=WORLD))
    loss_module.load_kernel = lambda: adapt_kernel(STAND_INS[behaviour])
    columns = VOCAB // WORLD
    mine = logits_LBV[..., ranks.tp_rank * columns : (ranks.tp_rank + 1) * columns].clone().requires_grad_()
    loss, weight = vocab_parallel_multi_hot_cross_entropy(mine * 1.0, targets, weights, ranks.groups.tp, "te")
    loss.sum().backward()
    return loss.detach(), weight, mine.grad


@pytest.mark.parametrize("behaviour", STAND_INS)
@pytest.mark.parametrize("bag_size", [1, 2, 6, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_over_two_shards_equals_the_loop_over_targets(behaviour, bag_size, dtype):
    logits = (4 * torch.randn(6, 2, VOCAB, generator=torch.Generator().manual_seed(1))).to(dtype)
    targets, weights = edge_targets((2, 6), VOCAB, bag_size), bag_weights("power_law", bag_size)
    ranks = run_distributed(lose, WORLD, behaviour, logits, targets, weights)
    wanted_loss, wanted_weight, wanted_gradient = loss_and_gradient(logits.transpose(0, 1), targets, weights)
    for loss, weight, _ in ranks:
        torch.testing.assert_close(loss.double(), wanted_loss, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(weight.double(), wanted_weight, rtol=1e-6, atol=1e-7)
    gradient = torch.cat([rank[2] for rank in ranks], dim=-1).transpose(0, 1)
    rtol = 1e-5 if dtype == torch.float32 else 2 * ONE_ROUNDING
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=rtol, atol=1e-6)


def train_with_kernel(behaviour, argv, initial):
    kernel = adapt_kernel(STAND_INS[behaviour])
    loss_module.load_kernel = build.load_kernel = lambda: kernel
    return train_layout([*argv, "--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "te"], initial)


@pytest.mark.parametrize("behaviour", STAND_INS)
@pytest.mark.parametrize("name", ["tp2-sp", "pp2"])
def test_run_with_the_kernel_equals_the_native_run(setup, behaviour, name):  # noqa: F811
    argv, one_rank = setup
    _, world_size, flags = LAYOUTS[name]
    initial, alone = one_rank(DENSE)
    label = f"te-{name}-{behaviour.split()[0]}"
    argv = argv(label, DENSE, f"{flags} {RECOMPUTE_ALL}")
    assert_same_training(alone, run_distributed(train_with_kernel, world_size, behaviour, argv, initial))
