"""The loss with Transformer Engine's own Triton kernels, compiled for the GPU, compared with a loop over targets.

tests/model/test_te_kernels.py runs the same files under Triton's interpreter.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from megatron_tst.model import loss as loss_module
from megatron_tst.model import vocab_parallel_multi_hot_cross_entropy
from megatron_tst.model.te_loss import adapt_kernel
from megatron_tst.superposition import bag_weights
from tests.model.kernels import load_wheel
from tests.reference import edge_targets, loss_and_gradient

L, B, VOCAB = 6, 2, 4000
ONE_ROUNDING = 2**-8
WHEELS = Path(os.environ.get("TST_TE_WHEELS", "nowhere"))
# One entry represents missing wheels, so that the report mentions them.
VERSIONS = sorted(path for path in WHEELS.glob("*/")) or [WHEELS]


@pytest.fixture
def wheel(request, cuda) -> Path:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    if not (request.param / "transformer_engine").is_dir():
        pytest.skip("needs Transformer Engine's Python wheels, one folder per version in TST_TE_WHEELS")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bag_size", [1, 16])
@pytest.mark.parametrize("wheel", VERSIONS, ids=lambda folder: folder.name, indirect=True)
def test_the_loss_of_the_kernel_matches_the_loop(rank, device, monkeypatch, record_property, wheel, bag_size, dtype):
    kernel = adapt_kernel(load_wheel(wheel))
    monkeypatch.setattr(loss_module, "load_kernel", lambda: kernel)
    logits = (4 * torch.randn(L, B, VOCAB)).to(dtype)
    targets, weights = edge_targets((B, L), VOCAB, bag_size), bag_weights("power_law", bag_size)
    upstream = torch.linspace(0.5, 2.0, B * L).view(B, L)
    wanted_loss, _, wanted_gradient = loss_and_gradient(logits.transpose(0, 1), targets, weights)
    wanted_gradient *= upstream.double().unsqueeze(-1)

    def compute():
        leaf = logits.to(device, copy=True).requires_grad_()
        # As in the model, the logits are the output of a layer, which the kernel may overwrite.
        arguments = leaf * 1.0, targets.to(device), weights.to(device), rank.groups.tp
        loss, _ = vocab_parallel_multi_hot_cross_entropy(*arguments, "te")
        (loss * upstream.to(device)).sum().backward()
        return loss.detach().cpu(), leaf.grad.transpose(0, 1).cpu()

    loss, gradient = compute()
    again = compute()
    is_same = torch.equal(loss, again[0]) and torch.equal(gradient, again[1])
    record_property("same bits twice", is_same)
    record_property("largest error of the loss", float((loss.double() - wanted_loss).abs().max()))
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-5, atol=1e-5)
    rtol = 1e-4 if dtype == torch.float32 else 2 * ONE_ROUNDING  # versions up to 2.17 round twice
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=rtol, atol=1e-6)
    assert is_same
    assert (loss.roll(1, dims=1) - wanted_loss).abs().max() > 0.1
