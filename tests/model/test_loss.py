"""The native loss on one rank; tests/distributed tests it on tensor-parallel ranks."""

import pytest
import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_tst.model import native_loss, vocab_parallel_multi_hot_cross_entropy
from megatron_tst.model.loss import mask_vocabulary_padding
from megatron_tst.model.target_columns import name_columns_once
from megatron_tst.superposition import bag_weights, multi_hot_cross_entropy
from tests.ops import OperationLog
from tests.reference import edge_targets, loss_and_gradient

L, B, VOCAB = 6, 2, 41


def run(logits_LBV, targets_BLS, weights_S, group):
    logits_LBV = logits_LBV.detach().requires_grad_()
    loss, weight = vocab_parallel_multi_hot_cross_entropy(logits_LBV, targets_BLS, weights_S, group)
    loss.sum().backward()
    return loss, weight, logits_LBV.grad


@pytest.fixture
def chunks_of_three_rows(monkeypatch):
    monkeypatch.setitem(native_loss.CHUNK_LOGITS, "cpu", 3 * VOCAB)


@pytest.mark.parametrize("bag_size", [1, 2, 6, 16])
@pytest.mark.parametrize("name", ["uniform", "power_law"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_the_native_loss_equals_the_loop_over_targets(rank, chunks_of_three_rows, bag_size, name, dtype, tolerance):
    logits = (4 * torch.randn(L, B, VOCAB)).to(dtype)
    targets, weights = edge_targets((B, L), VOCAB, bag_size), bag_weights(name, bag_size)
    before = logits.clone()
    loss, weight, gradient = run(logits, targets, weights, rank.groups.tp)
    wanted_loss, wanted_weight, wanted_gradient = loss_and_gradient(logits.transpose(0, 1), targets, weights)
    # The loss is computed in float32 from logits of either dtype; the gradient is rounded once to the logits' dtype.
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(weight.double(), wanted_weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient.transpose(0, 1).double(), wanted_gradient, rtol=tolerance, atol=1e-6)
    assert torch.equal(logits, before)
    assert gradient.dtype == dtype


def test_counting_an_ignored_target_changes_loss_and_gradient(rank):
    logits, targets, weights = torch.randn(L, B, VOCAB), edge_targets((B, L), VOCAB, 4), bag_weights("uniform", 4)
    loss, _, gradient = run(logits, targets, weights, rank.groups.tp)
    wrong_loss, _, wrong_gradient = run(logits, targets.clamp(min=0), weights, rank.groups.tp)
    assert (loss - wrong_loss).abs().max() > 0.1
    assert (gradient - wrong_gradient).abs().max() > 0.1


def test_bag_size_one_gives_megatron_cores_loss_bitwise(rank):
    logits, targets = torch.randn(L, B, 997), torch.randint(0, 997, (B, L, 1))
    loss, _, gradient = run(logits, targets, torch.ones(1), rank.groups.tp)
    stock_logits = logits.clone().requires_grad_()
    stock = vocab_parallel_cross_entropy(stock_logits * 1.0, targets[..., 0].transpose(0, 1).contiguous())
    stock.sum().backward()
    assert torch.equal(loss.transpose(0, 1), stock)
    torch.testing.assert_close(gradient, stock_logits.grad, rtol=1e-6, atol=1e-7)


def test_a_loop_over_targets_on_shared_logits_is_detected(rank):
    """megatron-core's own cross-entropy overwrites float32 logits, so a loop over targets is silently wrong."""
    logits, targets = torch.randn(L, B, VOCAB), torch.randint(0, VOCAB, (B, L, 4))
    loss, _, _ = run(logits, targets, bag_weights("uniform", 4), rank.groups.tp)
    shared = logits.clone()
    looped = [vocab_parallel_cross_entropy(shared, targets[..., i].transpose(0, 1).contiguous()) for i in range(4)]
    assert (torch.stack(looped).mean(0).transpose(0, 1) - loss).abs().max() > 0.1


def test_columns_named_once_sum_to_the_same_bits_in_any_order():
    columns, values = torch.randint(0, 5, (64, 16)), torch.rand(64, 16)
    order = torch.randperm(16)

    def add(values, order):
        return torch.zeros(64, 5).scatter_add_(-1, columns[:, order], values[:, order])

    once = name_columns_once(columns, values)
    assert torch.equal(add(once, order), add(once, torch.arange(16)))
    torch.testing.assert_close(add(once, order), add(values, order))
    assert not torch.equal(add(values, order), add(values, torch.arange(16)))


@pytest.mark.parametrize(("dtype", "exponentials"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_one_softmax_suffices_at_any_bag_size(rank, dtype, exponentials):
    def operations(bag_size):
        targets, weights = torch.randint(0, 4096, (B, L, bag_size)), bag_weights("uniform", bag_size)
        with OperationLog() as log:
            run(torch.randn(L, B, 4096, dtype=dtype), targets, weights, rank.groups.tp)
        return log.counts["exp_"], log.largest

    assert operations(16) == operations(1) == (exponentials, L * B * 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_written_into_the_memory_of_the_logits(rank, dtype):
    source = torch.randn(L, B, VOCAB, dtype=dtype, requires_grad=True)
    logits = source * 1.0
    addresses = []
    logits.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    targets, weights = edge_targets((B, L), VOCAB, 4), bag_weights("uniform", 4)
    loss, _ = vocab_parallel_multi_hot_cross_entropy(logits, targets, weights, rank.groups.tp)
    loss.sum().backward()
    assert addresses == [logits.data_ptr()]
    wanted = loss_and_gradient(source.detach().transpose(0, 1), targets, weights)[2].transpose(0, 1)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(source.grad.double(), wanted, rtol=tolerance, atol=1e-6)


def test_logits_without_a_gradient_are_left_unchanged(rank):
    logits = torch.randn(L, B, VOCAB)
    before = logits.clone()
    targets, weights = edge_targets((B, L), VOCAB, 4), bag_weights("uniform", 4)
    vocab_parallel_multi_hot_cross_entropy(logits, targets, weights, rank.groups.tp)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("cap", [torch.tanh, torch.sigmoid, torch.exp, lambda z: torch.log_softmax(z, dim=-1)])
def test_a_soft_cap_keeps_the_result_that_its_gradient_needs(rank, cap):
    source, targets, weights = torch.randn(L, B, VOCAB), edge_targets((B, L), VOCAB, 4), bag_weights("uniform", 4)

    def gradient(loss, cap=cap):
        leaf = source.clone().requires_grad_()
        loss(cap(leaf), targets, weights).sum().backward()
        return leaf.grad

    def ours(logits, targets, weights):
        return vocab_parallel_multi_hot_cross_entropy(logits, targets, weights, rank.groups.tp)[0]

    def reference(logits, targets, weights):
        return multi_hot_cross_entropy(logits.transpose(0, 1).double(), targets, weights)[0]

    torch.testing.assert_close(gradient(ours), gradient(reference), rtol=1e-5, atol=1e-6)
    # Through a view the saved result is not visible, and torch raises an error because it was overwritten.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(ours, cap=lambda logits: cap(logits).view_as(logits))


def test_ignored_targets_and_infinite_logits_leave_the_loss_finite(rank):
    logits = torch.randn(L, B, VOCAB)
    logits[..., 0] = -torch.inf
    targets = torch.randint(1, VOCAB, (B, L, 2))
    targets[..., 1] = -100
    loss, _, gradient = run(logits, targets, bag_weights("uniform", 2), rank.groups.tp)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_padding_of_the_vocabulary_is_neither_predicted_nor_trained(rank):
    real, padded = torch.randn(L, B, 30), 41
    targets, weights = torch.randint(0, 30, (B, L, 3)), bag_weights("uniform", 3)
    wanted_loss, _, wanted_gradient = run(real, targets, weights, rank.groups.tp)
    logits = torch.cat((real, torch.full((L, B, padded - 30), 9.0)), dim=-1).requires_grad_()
    masked = mask_vocabulary_padding(logits * 1.0, 30, tp_rank=0)
    loss, _ = vocab_parallel_multi_hot_cross_entropy(masked, targets, weights, rank.groups.tp)
    loss.sum().backward()
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(logits.grad[..., :30], wanted_gradient)
    assert not logits.grad[..., 30:].any()
    # Negative control: without the mask the padding gets most of the probability.
    unmasked, _ = vocab_parallel_multi_hot_cross_entropy(logits.detach(), targets, weights, rank.groups.tp)
    assert (unmasked - wanted_loss).min() > 1.0


def test_unknown_implementations_are_refused(rank):
    with pytest.raises(ValueError, match="unknown"):
        vocab_parallel_multi_hot_cross_entropy(
            torch.zeros(1, 1, 4), torch.zeros(1, 1, 1), torch.ones(1), rank.groups.tp, implementation="fast"
        )
