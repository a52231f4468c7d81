"""The loss with stand-ins of Transformer Engine's kernel in pure torch, which treat the logits in three ways."""

import pytest
import torch

from megatron_tst.config import UserError
from megatron_tst.megatron_patches import Libraries
from megatron_tst.model import loss as loss_module
from megatron_tst.model import te_loss, vocab_parallel_multi_hot_cross_entropy
from megatron_tst.model.te_loss import adapt_kernel, load_kernel
from megatron_tst.superposition import bag_weights
from tests.model.kernels import STAND_INS
from tests.reference import edge_targets, loss_and_gradient, mass_loss_and_gradient

L, B, VOCAB = 6, 2, 41
ONE_ROUNDING = 2**-8  # error of one rounding to bfloat16, with a margin for that of float32


def run(monkeypatch, kernel, logits, targets, weights, group, **kwargs):
    monkeypatch.setattr(loss_module, "load_kernel", lambda: adapt_kernel(kernel))
    leaf = logits.clone().requires_grad_()
    # As in the model, the logits are the output of a layer: a leaf must not be overwritten.
    loss, weight = vocab_parallel_multi_hot_cross_entropy(leaf * 1.0, targets, weights, group, "te", **kwargs)
    upstream = torch.linspace(0.5, 2.0, B * L).view(B, L)
    (loss * upstream).sum().backward()
    return loss.detach(), weight, leaf.grad, upstream


@pytest.fixture(params=STAND_INS)
def kernel(request):
    return STAND_INS[request.param]


@pytest.mark.parametrize("bag_size", [1, 2, 6, 16])
@pytest.mark.parametrize("name", ["uniform", "power_law", "first_token"])
def test_the_loss_in_float32_equals_the_loop_over_targets(rank, monkeypatch, kernel, bag_size, name):
    logits, weights = 4 * torch.randn(L, B, VOCAB), bag_weights(name, bag_size)
    targets = edge_targets((B, L), VOCAB, bag_size)
    loss, weight, gradient, upstream = run(monkeypatch, kernel, logits, targets, weights, rank.groups.tp)
    wanted_loss, wanted_weight, wanted_gradient = loss_and_gradient(logits.transpose(0, 1), targets, weights)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(weight.double(), wanted_weight, rtol=1e-6, atol=1e-7)
    wanted_gradient *= upstream.double().unsqueeze(-1)
    torch.testing.assert_close(gradient.transpose(0, 1).double(), wanted_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bag_size", [1, 2, 8, 16])
def test_in_bfloat16_the_targets_columns_are_rounded_once(rank, monkeypatch, kernel, bag_size):
    logits = (4 * torch.randn(L, B, VOCAB)).bfloat16()
    targets, weights = edge_targets((B, L), VOCAB, bag_size), bag_weights("uniform", bag_size)
    loss, _, gradient, upstream = run(monkeypatch, kernel, logits, targets, weights, rank.groups.tp)
    wanted_loss, _, wanted_gradient = loss_and_gradient(logits.transpose(0, 1), targets, weights)
    wanted_gradient *= upstream.double().unsqueeze(-1)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=2e-6, atol=2e-6)
    ours = gradient.transpose(0, 1).double()
    # Versions up to 2.17 round the rest of the row twice: when they store the gradient, and when they scale it.
    torch.testing.assert_close(ours, wanted_gradient, rtol=2 * ONE_ROUNDING, atol=1e-6)
    first_valid = targets.gather(-1, (targets != -100).int().argmax(-1, keepdim=True))
    named = torch.where(targets == -100, first_valid, targets)[(targets != -100).any(-1)]
    error = (ours - wanted_gradient).abs() / wanted_gradient.abs().clamp(min=1e-9)
    assert error[(targets != -100).any(-1)].gather(-1, named).max() <= ONE_ROUNDING


def test_adding_the_correction_in_bfloat16_is_detected():
    """The anchor's column would cancel: the number to which the subtracted one is added back is already rounded."""
    bag_size, rows = 16, 64
    logits = (4 * torch.randn(rows, 1, VOCAB)).bfloat16()
    targets, weights = torch.randint(0, VOCAB, (rows, 1, bag_size)), bag_weights("uniform", bag_size)
    wanted = loss_and_gradient(logits, targets, weights)[2]
    anchor = targets[..., :1]
    gradient = (torch.softmax(logits.float(), -1).scatter_add(-1, anchor, -torch.ones(rows, 1, 1))).bfloat16()
    gradient.scatter_add_(-1, anchor, torch.ones(rows, 1, 1, dtype=torch.bfloat16))
    gradient.scatter_add_(-1, targets, -weights.bfloat16().expand(rows, 1, -1))
    error = (gradient.double() - wanted).abs() / wanted.abs().clamp(min=1e-9)
    assert error.gather(-1, anchor).max() > 4 * ONE_ROUNDING


def test_a_loop_over_targets_is_detected(rank):
    """With a kernel that overwrites its input, later targets would read a gradient in place of logits."""
    logits, targets = torch.randn(L, B, VOCAB), torch.randint(0, VOCAB, (B, L, 4))
    kernel = adapt_kernel(STAND_INS["2.9 to 2.17"])
    shared = logits.clone()
    looped = [kernel(shared, targets[..., i].transpose(0, 1), -100, rank.groups.tp) for i in range(4)]
    wanted, _, _ = loss_and_gradient(logits.transpose(0, 1), targets, bag_weights("uniform", 4))
    assert (torch.stack(looped).mean(0).transpose(0, 1) - wanted).abs().max() > 0.1


@pytest.mark.parametrize("bag_size", [1, 2, 6, 16])
def test_mce_alt_equals_the_reference_and_the_native_loss(rank, monkeypatch, kernel, bag_size):
    logits, weights = 3 * torch.randn(L, B, VOCAB), bag_weights("uniform", bag_size)
    targets = edge_targets((B, L), VOCAB, bag_size)
    wanted_loss, wanted_weight, wanted_gradient = mass_loss_and_gradient(logits.transpose(0, 1), targets)
    loss, weight, gradient, upstream = run(
        monkeypatch, kernel, logits, targets, weights, rank.groups.tp, objective="mce_alt"
    )
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=3e-6, atol=3e-6)
    assert torch.equal(weight.double(), wanted_weight)
    wanted_gradient *= upstream.double().unsqueeze(-1)
    torch.testing.assert_close(gradient.transpose(0, 1).double(), wanted_gradient, rtol=1e-5, atol=1e-6)
    leaf = logits.clone().requires_grad_()
    native, _ = vocab_parallel_multi_hot_cross_entropy(leaf, targets, weights, rank.groups.tp, objective="mce_alt")
    (native * upstream).sum().backward()
    torch.testing.assert_close(native.double(), wanted_loss, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(leaf.grad.transpose(0, 1).double(), wanted_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bag_size", [1, 16])
def test_one_kernel_call_suffices_at_any_bag_size(rank, monkeypatch, kernel, bag_size):
    calls = []

    def counting(*args, **kwargs):
        calls.append(args)
        return kernel(*args, **kwargs)

    counting.__signature__ = te_loss.inspect.signature(kernel) if te_loss.inspect.isfunction(kernel) else None
    targets, weights = torch.randint(0, VOCAB, (B, L, bag_size)), bag_weights("uniform", bag_size)
    run(monkeypatch, counting, torch.randn(L, B, VOCAB), targets, weights, rank.groups.tp)
    assert len(calls) == 1


@pytest.mark.parametrize("version", ["2.8.0", "2.21.0", None])
def test_an_unsupported_version_is_refused(monkeypatch, version):
    load_kernel.cache_clear()
    monkeypatch.setattr(te_loss, "find_libraries", lambda: Libraries(transformer_engine=version))
    with pytest.raises(UserError, match=rf"Transformer Engine is {version or 'not usable'}; supported are 2.9 to 2.20"):
        load_kernel()
