"""The comparison of both sides' logits, including cases in which it must fail."""

import math

import pytest
import torch

from megatron_tst.conversion.casting import Casting
from megatron_tst.conversion.verify import (
    EXACT,
    Difference,
    DifferentLogitsError,
    compare_logits,
    tolerance_for,
)


@pytest.mark.parametrize(
    ("stored", "dtype", "largest_allowed"),
    [
        (torch.float32, None, 1e-4),
        (torch.bfloat16, torch.bfloat16, 1e-4),
        (torch.bfloat16, torch.float32, 1e-4),
        (torch.float32, torch.float16, 0.02),
        (torch.float32, torch.bfloat16, 0.1),
    ],
)
def test_only_rounded_weights_allow_a_larger_difference(stored, dtype, largest_allowed):
    casting = Casting(dtype)
    casting("weight", torch.ones(2, dtype=stored), default=stored)
    for share, passes in ((0.9, True), (1.1, False)):
        found = Difference(positions=5, largest=share * largest_allowed * 10, largest_logit=10.0, same_choice=5)
        if passes:
            found.check(tolerance_for(casting))
        else:
            with pytest.raises(DifferentLogitsError, match=r"--verify: largest logit difference .*--verify-tolerance"):
                found.check(tolerance_for(casting))


@pytest.mark.parametrize(("largest", "largest_logit"), [(math.nan, 1.0), (math.nan, math.nan), (math.inf, math.inf)])
def test_nan_and_infinity_never_pass(largest, largest_logit):
    with pytest.raises(DifferentLogitsError):
        Difference(positions=5, largest=largest, largest_logit=largest_logit, same_choice=5).check(9.0)
    assert DifferentLogitsError.exit_code == 1


@pytest.mark.parametrize("spoil", [None, 1.0, math.nan])
def test_different_models_are_distinguished_from_equal_ones(saved, tmp_path, spoil):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    safetensors = pytest.importorskip("safetensors.torch", reason="the extra hf is not installed")
    run = saved("llama")
    path = run.export(tmp_path / "hf") / "model.safetensors"
    weights = safetensors.load_file(path)
    if spoil is not None:
        weights["model.norm.weight"][3] += spoil
        safetensors.save_file(weights, path, metadata={"format": "pt"})
    found = compare_logits(run.model, tmp_path / "hf", list(range(16)))
    if spoil is None:
        assert found.largest_logit > 1
        found.check(EXACT)
        return
    with pytest.raises(DifferentLogitsError):
        found.check(EXACT)
