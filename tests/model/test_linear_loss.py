"""The linear loss, output layer and loss in one function, on one rank; tests/distributed tests it on several ranks."""

import pytest
import torch

from megatron_tst.config import UserError
from megatron_tst.distributed import seed_everything
from megatron_tst.model import (
    linear_loss,
    vocab_parallel_linear_multi_hot_cross_entropy,
    vocab_parallel_multi_hot_cross_entropy,
)
from megatron_tst.shape import loss_chunks
from megatron_tst.superposition import bag_weights
from tests.allocations import Allocations
from tests.model.small import DENSE, GPT2, LENGTH, MOE, VOCAB, small_model
from tests.ops import OperationLog
from tests.reference import edge_targets, loss_and_gradient, mass_loss_and_gradient

L, B, D, V = 6, 2, 16, 41
ONE_ROUNDING = 2**-8


@pytest.fixture(autouse=True)
def chunks_of_five_rows(monkeypatch):
    """Split the rows into three chunks, of which the last is shorter."""
    monkeypatch.setattr(loss_chunks, "SMALLEST_CHUNK", 5)


def make(dtype):
    hidden, weight = torch.randn(L, B, D), torch.randn(V, D)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def run(hidden, weight, targets, weights_S, group, upstream=None, scale=1.0, **options):
    loss, row_weight = vocab_parallel_linear_multi_hot_cross_entropy(
        hidden, weight, targets, weights_S, group, **options
    )
    (loss.sum() * scale if upstream is None else (loss * upstream).sum()).backward()
    return loss.detach(), row_weight


def expected(hidden, weight, targets, weights_S, objective="mce", upstream=None):
    """Return loss and gradients in float64; tensors between two matrix products are rounded to the matrices' dtype."""
    logits_BLV = (hidden @ weight.t()).detach().transpose(0, 1)
    if objective == "mce":
        loss, row_weight, at_logits = loss_and_gradient(logits_BLV, targets, weights_S)
    else:
        loss, row_weight, at_logits = mass_loss_and_gradient(logits_BLV, targets)
    if upstream is not None:
        at_logits = at_logits * upstream.double().unsqueeze(-1)
    at_logits = at_logits.transpose(0, 1).flatten(0, 1).to(hidden.dtype).double()
    at_hidden = (at_logits @ weight.detach().double()).view_as(hidden)
    return loss, row_weight, at_hidden, at_logits.t() @ hidden.detach().double().flatten(0, 1)


def assert_near(found, wanted, tolerance):
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("bag_size", [1, 2, 6, 16])
@pytest.mark.parametrize("objective", ["mce", "mce_alt"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, ONE_ROUNDING)], ids=str)
@pytest.mark.parametrize("has_upstream", [False, True], ids=["sum", "rows of their own"])
def test_the_linear_loss_equals_the_loop_over_targets(rank, bag_size, objective, dtype, tolerance, has_upstream):
    hidden, weight = make(dtype)
    targets, weights_S = edge_targets((B, L), V, bag_size), bag_weights("power_law", bag_size)
    upstream = torch.randn(B, L) if has_upstream else None
    loss, row_weight = run(hidden, weight, targets, weights_S, rank.groups.tp, upstream, objective=objective)
    wanted = expected(hidden, weight, targets, weights_S, objective, upstream)
    torch.testing.assert_close(loss.double(), wanted[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(row_weight.double(), wanted[1], rtol=1e-6, atol=1e-7)
    assert_near(hidden.grad, wanted[2], tolerance)
    assert_near(weight.grad, wanted[3], tolerance)
    assert hidden.grad.dtype == weight.grad.dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, ONE_ROUNDING)], ids=str)
def test_the_linear_loss_equals_the_native_loss_after_an_output_layer(rank, dtype, tolerance):
    hidden, weight = make(dtype)
    targets, weights_S = edge_targets((B, L), V, 6), bag_weights("uniform", 6)
    logits = hidden @ weight.t()
    wanted, _ = vocab_parallel_multi_hot_cross_entropy(logits, targets, weights_S, rank.groups.tp)
    (wanted.sum() / 7).backward()
    at_hidden, at_weight = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    loss, _ = vocab_parallel_linear_multi_hot_cross_entropy(hidden, weight, targets, weights_S, rank.groups.tp)
    (loss.sum() / 7).backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    # Each of the two gradients is one rounding away from the exact one.
    assert_near(hidden.grad, at_hidden.double(), 2 * tolerance)
    assert_near(weight.grad, at_weight.double(), 2 * tolerance)


def test_the_upstream_gradient_is_not_rounded_to_bfloat16(rank):
    hidden, weight = make(torch.bfloat16)
    targets, weights_S = edge_targets((B, L), V, 4), bag_weights("uniform", 4)
    run(hidden, weight, targets, weights_S, rank.groups.tp)
    unscaled, hidden.grad = hidden.grad, None
    run(hidden, weight, targets, weights_S, rank.groups.tp, scale=1 / 7)
    assert torch.equal(hidden.grad, (unscaled.float() / 7).bfloat16())


def test_treating_different_upstream_gradients_as_equal_is_detected(rank, monkeypatch):
    monkeypatch.setattr(linear_loss, "is_one_number", lambda upstream: True)
    hidden, weight = make(torch.float32)
    targets, weights_S, upstream = edge_targets((B, L), V, 4), bag_weights("uniform", 4), torch.randn(B, L)
    run(hidden, weight, targets, weights_S, rank.groups.tp, upstream)
    _, _, at_hidden, at_weight = expected(hidden, weight, targets, weights_S, upstream=upstream)
    for found, wanted in ((hidden.grad, at_hidden), (weight.grad, at_weight)):
        with pytest.raises(AssertionError):
            assert_near(found, wanted, 0.1)


@pytest.mark.parametrize(("upstream", "products"), [(None, 9), (torch.arange(12.0).view(B, L), 18)])
def test_a_sum_of_losses_takes_three_products_per_chunk_and_logits_are_never_whole(rank, upstream, products):
    hidden, weight = make(torch.float32)
    targets, weights_S = edge_targets((B, L), V, 4), bag_weights("uniform", 4)
    with OperationLog() as log:
        run(hidden, weight, targets, weights_S, rank.groups.tp, upstream)
    assert log.counts["mm"] + log.counts["addmm_"] == products
    assert log.largest == V * D < L * B * V * 2
    with OperationLog() as whole:
        logits = hidden @ weight.t()
        vocab_parallel_multi_hot_cross_entropy(logits, targets, weights_S, rank.groups.tp)[0].sum().backward()
    assert whole.counts["mm"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_is_about_an_eighth_of_that_of_whole_logits(rank, monkeypatch, dtype):
    monkeypatch.undo()
    rows, vocab = 4096, 4096
    hidden, weight = (
        torch.randn(rows, 1, 8).to(dtype).requires_grad_(),
        torch.randn(vocab, 8).to(dtype).requires_grad_(),
    )
    targets, weights_S = torch.randint(0, vocab, (1, rows, 4)), bag_weights("uniform", 4)

    def peak(loss):
        hidden.grad = weight.grad = None
        with Allocations([hidden, weight, targets, weights_S]) as allocations:
            loss().sum().backward()
        return allocations.peak - 4 * weight.numel()

    linear = peak(
        lambda: vocab_parallel_linear_multi_hot_cross_entropy(hidden, weight, targets, weights_S, rank.groups.tp)[0]
    )
    native = peak(
        lambda: vocab_parallel_multi_hot_cross_entropy(hidden @ weight.t(), targets, weights_S, rank.groups.tp)[0]
    )
    assert native >= rows * vocab * dtype.itemsize
    # In bfloat16 the float32 chunk, which both losses allocate, is not negligible at this size.
    assert linear <= (0.15 if dtype == torch.float32 else 0.2) * native


def test_evaluation_computes_no_gradient(rank):
    hidden, weight = make(torch.float32)
    targets, weights_S = edge_targets((B, L), V, 4), bag_weights("uniform", 4)
    with torch.no_grad(), OperationLog() as log:
        loss, _ = vocab_parallel_linear_multi_hot_cross_entropy(hidden, weight, targets, weights_S, rank.groups.tp)
    torch.testing.assert_close(loss.double(), expected(hidden, weight, targets, weights_S)[0], rtol=2e-6, atol=2e-6)
    assert log.counts["mm"] == 3 and not log.counts["addmm_"]


@pytest.mark.parametrize("num_real", [30, 0])
def test_padding_of_the_vocabulary_is_neither_predicted_nor_trained(rank, num_real):
    hidden, weight = make(torch.float32)
    targets, weights_S = torch.randint(0, 30, (B, L, 3)), bag_weights("uniform", 3)
    targets = targets if num_real else torch.full_like(targets, -100)
    loss, _ = run(hidden, weight, targets, weights_S, rank.groups.tp, num_real=num_real)
    assert not weight.grad[num_real:].any()
    if num_real:
        wanted = expected(hidden, weight[:30], targets, weights_S)
        torch.testing.assert_close(loss.double(), wanted[0], rtol=2e-6, atol=2e-6)
        assert_near(weight.grad[:30], wanted[3], 1e-6)
        # Negative control: with the padding in the softmax the loss differs.
        assert (run(hidden, weight, targets, weights_S, rank.groups.tp)[0] - loss).max() > 0.1
    else:
        assert not loss.any() and not hidden.grad.any()


@pytest.mark.parametrize("is_tied", [False, True])
def test_gradient_accumulation_fusion_adds_the_weights_gradient_to_main_grad(rank, is_tied):
    hidden, weight = make(torch.bfloat16)
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(V, D), False
    weight.zero_out_wgrad = is_tied
    targets, weights_S = edge_targets((B, L), V, 4), bag_weights("uniform", 4)
    run(hidden, weight, targets, weights_S, rank.groups.tp, fuse_gradient=True)
    wanted = expected(hidden, weight, targets, weights_S)[3]
    # Only the gradient at the logits is rounded to bfloat16; everything else is float32.
    assert_near(weight.main_grad - 1, wanted, ONE_ROUNDING / 2)
    assert weight.grad_added_to_main_grad
    assert not is_tied or not weight.grad.any()


@pytest.mark.parametrize("shape", [DENSE, MOE, GPT2], ids=["dense", "moe", "gpt2, tied"])
@pytest.mark.parametrize("bag_size", [1, 4])
def test_a_model_with_the_linear_loss_equals_the_model_with_the_native_loss(rank, shape, bag_size):
    models = []
    for implementation in ("native", "linear"):
        seed_everything(7)
        models.append(small_model(shape, implementation=implementation))
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    size = (3, LENGTH, bag_size) if bag_size > 1 else (3, LENGTH)
    bags, targets = torch.randint(0, VOCAB, size), torch.randint(0, VOCAB, size)
    positions = torch.arange(LENGTH).expand(3, -1)
    losses = [model(bags, positions, None, labels=targets) for model in models]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.mean().backward()
    for (name, parameter), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-5, atol=1e-7, msg=name)
    # Without labels the model returns logits.
    logits = [model(bags, positions, None) for model in models]
    assert torch.equal(*logits) and logits[0].shape == (3, LENGTH, VOCAB)


def test_chunks_are_an_eighth_of_the_rows_within_bounds(monkeypatch):
    monkeypatch.undo()
    sizes = (100, 4096, 8192, 16384, 1 << 20)
    assert [loss_chunks.chunk_rows(rows) for rows in sizes] == [512, 512, 1024, 2048, 4096]


@pytest.mark.parametrize("version", ["2.6.0", "2.9.1+cu130", "2.10.0a0+b558c986e8.nv25.11"])
def test_a_torch_version_without_mixed_products_is_refused(version):
    with pytest.raises(UserError, match="--cross-entropy-fusion-impl linear: torch is"):
        linear_loss.check_torch(version)
    for newer in ("2.10.0", "2.13.0a0+nv26.06", "2.14.1+cu130"):
        linear_loss.check_torch(newer)


def test_unknown_objectives_are_refused(rank):
    with pytest.raises(ValueError, match="unknown"):
        run(*make(torch.float32), edge_targets((B, L), V, 2), torch.ones(2), rank.groups.tp, objective="other")
