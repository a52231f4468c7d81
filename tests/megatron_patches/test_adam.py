"""Three bugs of megatron-core's distributed optimizer over torch's Adam: shown in the original, repaired in ours."""

import copy

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_tst.megatron_patches.adam import TorchAdamDistributedOptimizer, make_resumable
from tests.model.small import DENSE, small_model


@pytest.fixture(params=["ours", "original"])
def optimizer(request, rank):
    """Return a distributed optimizer, repaired or original, before its first step, and its DDP model."""
    model = small_model(DENSE)
    chunk = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    config = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True)
    (optimizer,) = get_megatron_optimizer(config, [chunk]).chained_optimizers
    if request.param == "ours":
        make_resumable(optimizer)
    return optimizer, chunk


def step(optimizer, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in chunk.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.step()


def weights(chunk):
    return torch.cat([parameter.detach().flatten() for parameter in chunk.parameters()])


def test_state_exists_before_the_first_step(optimizer):
    optimizer, _ = optimizer
    if type(optimizer) is DistributedOptimizer:
        with pytest.raises(AssertionError):
            optimizer.state_dict()
        return
    assert optimizer.state_dict()["optimizer"]["param_groups"][0]["step"] == 0


@torch.no_grad()
def test_moments_are_loaded_without_a_step_count(optimizer):
    optimizer, chunk = optimizer
    step(optimizer, chunk, 0)
    parameter = next(p for p in chunk.parameters() if p in optimizer.model_param_group_index_map)
    tensors = dict(optimizer._get_main_param_and_optimizer_states(parameter))
    moments = {name: tensors[name].clone() + 1 for name in ("param", "exp_avg", "exp_avg_sq")}
    if type(optimizer) is DistributedOptimizer:
        with pytest.raises(KeyError, match="step"):
            optimizer._set_main_param_and_optimizer_states(parameter, moments)
        return
    optimizer._set_main_param_and_optimizer_states(parameter, moments)
    after = optimizer._get_main_param_and_optimizer_states(parameter)
    assert all(torch.equal(after[name], moments[name]) for name in moments)
    assert after["step"] == 1


def test_resumed_step_equals_the_uninterrupted_one(optimizer):
    """In the original all parameters share one step count, which Adam advances once per parameter."""
    optimizer, chunk = optimizer
    step(optimizer, chunk, 0)
    before, state = weights(chunk).clone(), copy.deepcopy(optimizer.state_dict())
    moments = copy.deepcopy(list(optimizer.optimizer.state.values()))
    mains = [p.detach().clone() for group in optimizer.optimizer.param_groups for p in group["params"]]
    step(optimizer, chunk, 1)
    wanted = weights(chunk).clone()

    with torch.no_grad():
        for parameter, value in zip(
            chunk.parameters(), before.split([p.numel() for p in chunk.parameters()]), strict=True
        ):
            parameter.copy_(value.view(parameter.shape))
        parameters = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
        for parameter, value in zip(parameters, mains, strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state)
    for held, saved in zip(optimizer.optimizer.state.values(), moments, strict=True):
        held["exp_avg"].copy_(saved["exp_avg"])
        held["exp_avg_sq"].copy_(saved["exp_avg_sq"])
    step(optimizer, chunk, 1)
    assert torch.equal(weights(chunk), wanted) == (type(optimizer) is TorchAdamDistributedOptimizer)


def test_other_optimizers_are_not_changed(rank):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    make_resumable(optimizer)
    assert type(optimizer) is torch.optim.AdamW
