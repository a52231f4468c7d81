"""The computations of a step with torch's own kernels in bfloat16 on this device, compared with float64 on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention.bias import causal_upper_left

from megatron_tst.model import attention as attention_module
from megatron_tst.model import vocab_parallel_linear_multi_hot_cross_entropy, vocab_parallel_multi_hot_cross_entropy
from megatron_tst.model.attention import ScaledDotProductAttention
from megatron_tst.model.embedding import _BagSum
from megatron_tst.shape import loss_chunks
from megatron_tst.superposition import bag_weights
from tests.reference import edge_targets, loss_and_gradient

ONE_ROUNDING = 2**-8  # error of one rounding to bfloat16, with a margin for that of float32


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    return float((found.cpu().double() - wanted).abs().max() / wanted.abs().max())


def twice(compute):
    """Compute twice, and return the first result and whether both are bitwise equal."""
    first, second = compute(), compute()
    return first, all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("is_whole", [False, True], ids=["a shard", "the whole table"])
def test_the_embedding_of_bags_matches_float64(device, mode, is_whole, record_property):
    num_bags, bag_size, vocab, width = 2048, 8, 40, 128  # each row of the weight collects some 400 gradients
    weight = torch.randn(vocab, width).bfloat16()
    rows, upstream = torch.randint(0, vocab, (num_bags, bag_size)), torch.randn(num_bags, width)
    counts = torch.nn.functional.one_hot(rows, vocab).sum(1).double()
    counts_of_one_more = counts + torch.nn.functional.one_hot(rows[:, 0], vocab)

    def compute():
        leaf = weight.to(device, copy=True).requires_grad_()
        total = _BagSum.apply(leaf, rows.to(device), is_whole)
        total.backward(upstream.to(device))
        return total.detach(), leaf.grad

    (total, gradient), is_same = twice(compute)
    assert is_same or not (mode or device.type == "cpu")
    record_property("same bits twice", is_same)
    assert error(total, counts @ weight.double()) < 1e-6
    assert error(gradient, counts.T @ upstream.double()) < ONE_ROUNDING
    # Negative control: counting a token twice gives another result.
    assert error(gradient, counts_of_one_more.T @ upstream.double()) > 4 * ONE_ROUNDING


def attend_in_float64(query, key, value):
    """Compute attention in float64; queries ``[Q, B, H, E]`` are the last positions of the keys ``[T, B, K, E]``."""
    groups = query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(groups, dim=2) for tensor in (key, value))
    scores = torch.einsum("qbhe,tbhe->bhqt", query, key) / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(key.shape[0] - query.shape[0] + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhqt,tbhe->qbhe", weights, value).flatten(2)


@pytest.mark.parametrize("num_keys", [128, 320], ids=["whole", "later chunk"])
def test_attention_matches_float64(rank, device, mode, record_property, monkeypatch, num_keys):
    """Cases are a whole sequence, and the later chunk of a context-parallel rank, whose causal mask is not square."""
    config = SimpleNamespace(sequence_parallel=False, attention_dropout=0.0)
    module = ScaledDotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=rank.groups)
    shapes = (128, 2, 8, 64), (num_keys, 2, 4, 64), (num_keys, 2, 4, 64)
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    upstream = torch.randn(128, 2, 8 * 64).bfloat16()
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    wanted_output = attend_in_float64(*exact)
    wanted_output.backward(upstream.double())
    wanted = [wanted_output.detach(), *(leaf.grad for leaf in exact)]

    def compute():
        leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in inputs]
        output = module.attend(*leaves)
        output.backward(upstream.to(device))
        return output.detach(), *(leaf.grad for leaf in leaves)

    found, is_same = twice(compute)
    assert is_same or not mode
    record_property("same bits twice", is_same)
    errors = [error(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)]
    record_property("largest relative error", max(errors))
    assert max(errors) < 6 * ONE_ROUNDING
    if num_keys > 128:
        # Negative control: a causal mask aligned to the upper left hides keys from the later chunk.
        monkeypatch.setattr(attention_module, "causal_lower_right", causal_upper_left)
        assert error(compute()[0], wanted[0]) > 0.1


@pytest.mark.parametrize("bag_size", [1, 16])
def test_the_native_loss_matches_float64(rank, device, mode, record_property, bag_size):
    vocab, batch, length = 4000, 2, 6
    logits = (4 * torch.randn(length, batch, vocab)).bfloat16()
    targets, weights = edge_targets((batch, length), vocab, bag_size), bag_weights("power_law", bag_size)
    wanted_loss, _, wanted_gradient = loss_and_gradient(logits.transpose(0, 1), targets, weights)

    def compute():
        leaf = logits.to(device, copy=True).requires_grad_()
        arguments = leaf, targets.to(device), weights.to(device), rank.groups.tp
        loss, _ = vocab_parallel_multi_hot_cross_entropy(*arguments, "native")
        loss.sum().backward()
        return loss.detach(), leaf.grad.transpose(0, 1)

    (loss, gradient), is_same = twice(compute)
    assert is_same  # the kernels do not add across rows
    record_property("largest relative error of the loss", error(loss, wanted_loss))
    assert error(loss, wanted_loss) < 1e-5
    torch.testing.assert_close(gradient.cpu().double(), wanted_gradient, rtol=ONE_ROUNDING, atol=1e-6)
    assert error(loss.roll(1, dims=1), wanted_loss) > 0.01


@pytest.mark.parametrize("bag_size", [1, 16])
def test_the_linear_loss_matches_float64(rank, device, mode, monkeypatch, record_property, bag_size):
    monkeypatch.setattr(loss_chunks, "SMALLEST_CHUNK", 5)
    vocab, batch, length, width = 4000, 2, 6, 64
    hidden, weight = torch.randn(length, batch, width).bfloat16(), (torch.randn(vocab, width) / 2).bfloat16()
    targets, weights = edge_targets((batch, length), vocab, bag_size), bag_weights("power_law", bag_size)
    logits = hidden.double() @ weight.double().t()
    wanted_loss, _, at_logits = loss_and_gradient(logits.transpose(0, 1), targets, weights)
    at_logits = at_logits.transpose(0, 1).flatten(0, 1)
    wanted_hidden = (at_logits @ weight.double()).view_as(hidden)
    wanted_weight = at_logits.t() @ hidden.double().flatten(0, 1)

    def compute():
        leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in (hidden, weight)]
        loss, _ = vocab_parallel_linear_multi_hot_cross_entropy(
            *leaves, targets.to(device), weights.to(device), rank.groups.tp
        )
        loss.sum().backward()
        return loss.detach(), *(leaf.grad for leaf in leaves)

    (loss, *gradients), is_same = twice(compute)
    assert is_same or not mode
    # The logits, their gradients and the results are each rounded to bfloat16.
    errors = [
        error(*pair) for pair in zip((loss, *gradients), (wanted_loss, wanted_hidden, wanted_weight), strict=True)
    ]
    record_property("largest relative error", max(errors))
    assert max(errors) < 4 * ONE_ROUNDING
    assert error(loss.roll(1, dims=1), wanted_loss) > 0.01
