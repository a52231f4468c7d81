"""The loss never waits for the device or depends on the values of tensors; otherwise no CUDA graph could capture it."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megatron_tst.model import loss as loss_module
from megatron_tst.model import vocab_parallel_linear_multi_hot_cross_entropy, vocab_parallel_multi_hot_cross_entropy
from megatron_tst.model.te_loss import adapt_kernel
from tests.model.kernels import STAND_INS

L, B, VOCAB = 6, 2, 41


@pytest.mark.parametrize("bag_size", [1, 6])
@pytest.mark.parametrize("objective", ["mce", "mce_alt"])
@pytest.mark.parametrize("implementation", ["native", *STAND_INS])
def test_the_loss_does_not_read_the_values_of_tensors(rank, monkeypatch, implementation, objective, bag_size):
    if implementation != "native":
        kernel = adapt_kernel(STAND_INS[implementation])
        monkeypatch.setattr(loss_module, "load_kernel", lambda: kernel)
        implementation = "te"
    with FakeTensorMode():
        leaf = torch.empty(L, B, VOCAB, dtype=torch.bfloat16, requires_grad=True)
        targets, weights = torch.empty(B, L, bag_size, dtype=torch.int64), torch.empty(bag_size)
        loss, weight = vocab_parallel_multi_hot_cross_entropy(
            leaf * 1.0, targets, weights, rank.groups.tp, implementation, objective=objective
        )
        loss.sum().backward()
    assert loss.shape == weight.shape == (B, L)
    assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("bag_size", [1, 6])
@pytest.mark.parametrize("objective", ["mce", "mce_alt"])
def test_the_linear_loss_does_not_read_the_values_of_tensors(rank, objective, bag_size):
    with FakeTensorMode():
        hidden = torch.empty(L, B, 16, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(VOCAB, 16, dtype=torch.bfloat16, requires_grad=True)
        targets, weights = torch.empty(B, L, bag_size, dtype=torch.int64), torch.empty(bag_size)
        loss, _ = vocab_parallel_linear_multi_hot_cross_entropy(
            hidden, weight, targets, weights, rank.groups.tp, objective=objective
        )
        loss.sum().backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def test_reading_the_values_of_tensors_is_detected():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        (torch.empty(3) > 0).any().item()
