"""The loss with the Triton kernels of each Transformer Engine version, run by Triton's interpreter.

tests/run.sh fetches the wheels and runs this file on its own with TRITON_INTERPRET=1.
"""

import os
from pathlib import Path

import pytest
import torch

WHEELS = Path(os.environ.get("TST_TE_WHEELS", "nowhere"))
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VERSIONS = sorted(path for path in WHEELS.glob("*/") if IS_INTERPRETED)

pytestmark = [
    pytest.mark.te_kernels,
    pytest.mark.skipif(not VERSIONS, reason="needs TRITON_INTERPRET=1 and unpacked wheels in TST_TE_WHEELS"),
]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("bag_size", [1, 2, 6, 16])
@pytest.mark.parametrize("objective", ["mce", "mce_alt"])
def test_the_loss_of_the_real_kernel_equals_the_loop_over_targets(rank, monkeypatch, folder, bag_size, objective):
    from megatron_tst.superposition import bag_weights
    from tests.model.kernels import load_wheel
    from tests.model.test_te_loss import VOCAB, B, L, run
    from tests.reference import edge_targets, loss_and_gradient, mass_loss_and_gradient

    logits, weights = 4 * torch.randn(L, B, VOCAB), bag_weights("power_law", bag_size)
    targets = edge_targets((B, L), VOCAB, bag_size)
    wanted = loss_and_gradient(logits.transpose(0, 1), targets, weights)
    if objective == "mce_alt":
        wanted = mass_loss_and_gradient(logits.transpose(0, 1), targets)
    kernel = load_wheel(folder)
    loss, weight, gradient, upstream = run(
        monkeypatch, kernel, logits, targets, weights, rank.groups.tp, objective=objective
    )
    torch.testing.assert_close(loss.double(), wanted[0], rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(weight.double(), wanted[1], rtol=1e-6, atol=1e-7)
    wanted_gradient = wanted[2] * upstream.double().unsqueeze(-1)
    torch.testing.assert_close(gradient.transpose(0, 1).double(), wanted_gradient, rtol=1e-5, atol=1e-6)


def confident_logits(targets_BL):
    """Return bfloat16 logits that give the first target of each row a gradient close to zero."""
    from tests.model.test_te_loss import VOCAB

    logits = 4 * torch.randn(*targets_BL.T.shape, VOCAB)
    return logits.scatter_(-1, targets_BL.T.unsqueeze(-1), 12.0).bfloat16()


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("bag_size", [1, 6])
def test_in_bfloat16_the_targets_columns_are_rounded_once(rank, monkeypatch, folder, bag_size):
    """This holds whatever a version stores in place of the logits (Transformer Engine #3193 and #3273)."""
    from megatron_tst.superposition import bag_weights
    from tests.model.kernels import compute_bfloat16, load_wheel
    from tests.model.test_te_loss import ONE_ROUNDING, VOCAB, B, L, run
    from tests.reference import loss_and_gradient

    compute_bfloat16(monkeypatch)
    targets, weights = torch.randint(0, VOCAB, (B, L, bag_size)), bag_weights("uniform", bag_size)
    logits = confident_logits(targets[..., 0])
    wanted_loss, _, wanted = loss_and_gradient(logits.transpose(0, 1), targets, weights)
    loss, _, gradient, upstream = run(monkeypatch, load_wheel(folder), logits, targets, weights, rank.groups.tp)
    wanted *= upstream.double().unsqueeze(-1)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=3e-6, atol=3e-6)
    error = (gradient.transpose(0, 1).double() - wanted).abs() / wanted.abs().clamp(min=1e-5)
    assert error.gather(-1, targets).max() <= ONE_ROUNDING
    # Versions up to 2.17 round the rest of the row twice: when they store the gradient, and when they scale it.
    assert error.max() <= 2 * ONE_ROUNDING


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_up_to_2_17_the_kernel_alone_loses_the_gradient_of_a_confident_target(rank, monkeypatch, folder):
    from packaging.version import Version

    from megatron_tst.model.te_loss import adapt_kernel
    from tests.model.kernels import compute_bfloat16, load_wheel
    from tests.model.test_te_loss import ONE_ROUNDING, VOCAB, B, L
    from tests.reference import loss_and_gradient

    compute_bfloat16(monkeypatch)
    targets = torch.randint(0, VOCAB, (B, L, 1))
    logits = confident_logits(targets[..., 0])
    leaf = logits.clone().requires_grad_()
    adapt_kernel(load_wheel(folder))(leaf * 1.0, targets[..., 0].T, -100, rank.groups.tp).sum().backward()
    wanted = loss_and_gradient(logits.transpose(0, 1), targets, torch.ones(1))[2]
    error = (leaf.grad.transpose(0, 1).double() - wanted).abs() / wanted.abs().clamp(min=1e-5)
    assert (error.gather(-1, targets).max() > 4 * ONE_ROUNDING) == (Version(folder.name) < Version("2.18"))


@pytest.mark.parametrize("folder", VERSIONS[:1], ids=lambda folder: folder.name)
def test_a_loop_over_targets_on_the_real_kernel_is_detected(rank, folder):
    from megatron_tst.model.te_loss import adapt_kernel
    from tests.model.kernels import load_wheel
    from tests.model.test_te_loss import VOCAB, B, L
    from tests.reference import loss_and_gradient

    kernel = adapt_kernel(load_wheel(folder))
    logits, targets = torch.randn(L, B, VOCAB), torch.randint(0, VOCAB, (B, L, 4))
    shared = logits.clone()
    looped = [kernel(shared, targets[..., i].transpose(0, 1), -100, rank.groups.tp) for i in range(4)]
    wanted, _, _ = loss_and_gradient(logits.transpose(0, 1), targets, torch.full((4,), 0.25))
    assert (torch.stack(looped).mean(0).transpose(0, 1) - wanted).abs().max() > 0.1
