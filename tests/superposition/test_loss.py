import pytest
import torch

from megatron_tst.superposition import bag_weights, multi_hot_cross_entropy, target_coefficients
from tests.reference import edge_targets, loss_and_gradient

VOCAB = 23


@pytest.mark.parametrize("bag_size", [1, 2, 6])
@pytest.mark.parametrize("name", ["uniform", "power_law", "first_token"])
def test_reference_equals_a_loop_over_rows(bag_size, name):
    logits = torch.randn(2, 5, VOCAB, dtype=torch.float64, requires_grad=True)
    targets, weights = edge_targets((2, 5), VOCAB, bag_size), bag_weights(name, bag_size)
    loss, row_weight = multi_hot_cross_entropy(logits, targets, weights)
    loss.sum().backward()
    expected = loss_and_gradient(logits.detach(), targets, weights)
    for value, wanted in zip((loss, row_weight, logits.grad), expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)


def test_unmasked_ignored_target_changes_the_loss():
    logits = torch.randn(2, 5, VOCAB)
    targets, weights = edge_targets((2, 5), VOCAB, 4), bag_weights("uniform", 4)
    loss, _ = multi_hot_cross_entropy(logits, targets, weights)
    unmasked, _ = multi_hot_cross_entropy(logits, targets.clamp(min=0), weights)
    assert (loss - unmasked).abs().max() > 0.1


def test_row_without_targets_has_neither_loss_nor_gradient():
    logits = torch.randn(1, VOCAB)
    logits[0, 0] = -torch.inf
    logits.requires_grad_()
    loss, weight = multi_hot_cross_entropy(logits, torch.full((1, 3), -100), bag_weights("uniform", 3))
    loss.sum().backward()
    assert loss.item() == weight.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_loss_with_bag_size_one_equals_torchs_cross_entropy():
    logits, targets = torch.randn(7, VOCAB), torch.randint(0, VOCAB, (7, 1))
    targets[3] = -100
    loss, _ = multi_hot_cross_entropy(logits, targets, bag_weights("uniform", 1))
    wanted = torch.nn.functional.cross_entropy(logits, targets[:, 0], reduction="none")
    torch.testing.assert_close(loss, wanted)


def test_coefficients_sum_the_weights_of_equal_columns():
    columns = torch.tensor([[4, 7, 4, 9]])
    weights = torch.tensor([[0.5, 0.25, 0.125, 0.0]])
    assert target_coefficients(columns, weights).tolist() == [[0.625, 0.25, 0.625, 0.0]]
