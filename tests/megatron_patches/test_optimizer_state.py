"""The saved state of parameters behind padded buckets: wrong in the original, correct in ours."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_tst.checkpoint.content import CONTENT_METADATA
from megatron_tst.megatron_patches.adam import TorchAdamDistributedOptimizer, make_resumable
from megatron_tst.megatron_patches.optimizer_state import KeptStateOptimizer
from tests.model.small import DENSE, small_model

BETA1, BETA2 = 0.9, 0.99


def listed_after_a_step(optimizer_class: type, bucket_size: int | None):
    """Take one optimizer step with known gradients.

    Returns:
        Weights, gradient and listed state of each parameter, in the order of the buffer; and the buffer.
    """
    model = small_model(DENSE)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=bucket_size
    )
    chunk = DistributedDataParallel(model.config, ddp_config, model)
    config = OptimizerConfig(optimizer="adam", lr=0.1, adam_beta1=BETA1, adam_beta2=BETA2, clip_grad=0.0)
    config.use_distributed_optimizer = True
    (optimizer,) = get_megatron_optimizer(config, [chunk]).chained_optimizers
    optimizer.__class__ = optimizer_class
    generator = torch.Generator().manual_seed(0)
    for parameter in chunk.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.step()
    (buffer,) = chunk.buffers
    listed = optimizer.sharded_param_state_fully_reshardable(
        chunk.module.sharded_state_dict(), is_loading=False, metadata=CONTENT_METADATA
    )
    states = [(p, p.main_grad, state) for p, state in zip(buffer.param_index_map, listed.values(), strict=True)]
    return states, buffer


def num_wrong(states) -> int:
    """Return the number of parameters whose listed state is not their weights and the moments of one step of Adam."""
    wrong = 0
    for parameter, gradient, state in states:
        moments = (1 - BETA1) * gradient, (1 - BETA2) * gradient**2
        is_right = torch.equal(state["param"].data, parameter) and all(
            torch.allclose(state[name].data, moment, rtol=1e-5)
            for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True)
        )
        wrong += not is_right
    return wrong


def is_padded(bucket) -> bool:
    return bucket.grad_data.numel() > bucket.numel_unpadded


@pytest.mark.parametrize("optimizer_class", [TorchAdamDistributedOptimizer, KeptStateOptimizer])
@pytest.mark.parametrize("bucket_size", [None, 1, 3000])
def test_each_parameter_is_listed_with_its_own_state(rank, optimizer_class, bucket_size):
    states, buffer = listed_after_a_step(optimizer_class, bucket_size)
    assert sum(map(is_padded, buffer.buckets)) > 2 or bucket_size is None
    assert num_wrong(states) == 0


def test_original_lists_the_state_of_neighbours(rank):
    """Negative control: megatron-core slices the state of parameters behind a padded bucket at the wrong offset."""
    states, buffer = listed_after_a_step(DistributedOptimizer, bucket_size=3000)
    first = next(index for index, bucket in enumerate(buffer.buckets) if is_padded(bucket))
    behind = sum(bucket > first for *_, bucket in buffer.param_index_map.values())
    assert num_wrong(states) == behind > 5


@pytest.mark.parametrize("inner", [torch.optim.AdamW, torch.optim.SGD])
def test_every_distributed_optimizer_is_repaired(inner):
    optimizer = DistributedOptimizer.__new__(DistributedOptimizer)
    optimizer.optimizer = inner([torch.nn.Parameter(torch.zeros(1))])
    make_resumable(optimizer)
    wanted = TorchAdamDistributedOptimizer if inner is torch.optim.AdamW else KeptStateOptimizer
    assert type(optimizer) is wanted
