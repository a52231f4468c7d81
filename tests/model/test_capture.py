"""Nothing in the loss may wait for the device or depend on what tensors hold: else no CUDA graph can hold it."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megatron_tst.model import loss as loss_module
from megatron_tst.model import vocab_parallel_multi_hot_cross_entropy

L, B, VOCAB = 6, 2, 41


def kernel(logits, targets, ignore_index, group):
    """A fused cross-entropy as the product calls it."""
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="none"
    ).view(targets.shape)


@pytest.mark.parametrize("bag_size", [1, 6])
@pytest.mark.parametrize("objective", ["mce", "mce_alt"])
@pytest.mark.parametrize("implementation", ["te", "native"])
def test_tensors_without_content_are_enough(rank, monkeypatch, implementation, objective, bag_size):
    monkeypatch.setattr(loss_module, "load_kernel", lambda: kernel)
    with FakeTensorMode():
        leaf = torch.empty(L, B, VOCAB, dtype=torch.bfloat16, requires_grad=True)
        targets, weights = torch.empty(B, L, bag_size, dtype=torch.int64), torch.empty(bag_size)
        loss, weight = vocab_parallel_multi_hot_cross_entropy(
            leaf * 1.0, targets, weights, rank.groups.tp, implementation, objective=objective
        )
        loss.sum().backward()
    assert loss.shape == weight.shape == (B, L)
    assert leaf.grad.shape == leaf.shape


def test_asking_for_content_is_told_apart():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        (torch.empty(3) > 0).any().item()
