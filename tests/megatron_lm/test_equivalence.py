"""Both trainers give the same losses in every step and every evaluation of the same run."""

from pathlib import Path
from typing import Any

import pytest

from tests.megatron_lm.trainers import EXPERTS, distance, needs_trainer, run_megatron_lm, run_own, settings, write

pytestmark = [needs_trainer, pytest.mark.distributed]
TOLERANCE = 5e-6

# Settings that differ from those of the small run, by section.
KINDS: dict[str, dict[str, Any]] = {
    "power-law-masked": {"superposition": {"tst_bag_weights": "power_law"}, "data": {"eod_mask_loss": True}},
    "mce-alt": {"superposition": {"tst_objective": "mce_alt"}},
    "output": {"superposition": {"tst_superpose": "output"}},
    "experts": {"model": EXPERTS},
}
MORE: dict[str, dict[str, Any]] = {
    "uniform": {},
    "linear": {"training": {"cross_entropy_fusion_impl": "linear"}},
    "mce-alt-masked": {"superposition": {"tst_objective": "mce_alt"}, "data": {"eod_mask_loss": True}},
    "exponential": {"superposition": {"tst_bag_weights": "exponential"}},
    "mutual-information": {"superposition": {"tst_bag_weights": "mutual_information"}},
    "input": {"superposition": {"tst_superpose": "input"}},
    "tied-qk-norm": {"model": {"untie_embeddings_and_output_weights": False, "qk_layernorm": True}},
    "gpt2": {
        "model": {
            "swiglu": False, "normalization": "LayerNorm", "position_embedding_type": "learned_absolute",
            "disable_bias_linear": False,
        }
    },
    "three-phases": {"phases": [{"bag_size": 4, "steps": 3}, {"bag_size": 2, "steps": 2}, {"bag_size": 1, "steps": 3}]},
    "recomputed": {
        "training": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    },
    "experts-dropping": {"model": {**EXPERTS, "moe_expert_capacity_factor": 1.0, "moe_z_loss_coeff": 1e-3}},
    "bf16": {"training": {"bf16": True, "accumulate_allreduce_grads_in_fp32": True}},
}  # fmt: skip


def train_both(corpus, tokenizer, folder: Path, kind: dict[str, Any], *flags: str):
    config = write(folder / "run.yaml", settings(corpus, str(tokenizer.path), **kind))
    argv = ["--config", config, *flags]
    model = kind.get("model", {})
    if "num_experts" not in model and "position_embedding_type" not in model:
        return run_own(argv, folder / "own"), run_megatron_lm(argv, folder / "megatron-lm")
    # Megatron-LM draws experts and position embeddings from another random stream, so both runs start from the weights
    # of one checkpoint.
    run_own([*argv, "--train-iters", "1", "--tst-steps", "1", "--lr-warmup-iters", "0"], folder / "start")
    load = ["--load", str(folder / "start" / "checkpoints"), "--finetune"]
    return run_own([*argv, *load], folder / "own"), run_megatron_lm([*argv, *load], folder / "megatron-lm")


def compare(own, theirs):
    assert distance(own, theirs) <= TOLERANCE
    exact = ("step", "phase", "bag_size", "loss_kind", "data_tokens", "positions", "flops", "data_epochs")
    for ours, line in zip(own, theirs, strict=True):
        assert [(name, ours[name]) for name in exact if name in ours] == [(n, line[n]) for n in exact if n in line]
        assert ours.keys() == line.keys()
        if "valid_loss" in ours:
            assert ours["bits_per_byte"] == pytest.approx(line["bits_per_byte"], abs=TOLERANCE)
        if "lr" in ours:
            assert ours["lr"] == pytest.approx(line["lr"])
            assert ours["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)


def without_experts(lines):
    return [line for line in lines if "expert_load_max" not in line]


@pytest.mark.parametrize("kind", KINDS)
def test_both_trainers_give_the_same_losses(corpus, tokenizer, tmp_path, kind):
    own, theirs = train_both(corpus, tokenizer, tmp_path, KINDS[kind])
    compare(without_experts(own), theirs)


@pytest.mark.long
@pytest.mark.parametrize("kind", MORE)
def test_both_trainers_give_the_same_losses_in_every_setting(corpus, tokenizer, tmp_path, kind):
    own, theirs = train_both(corpus, tokenizer, tmp_path, MORE[kind])
    compare(without_experts(own), theirs)


def test_another_loss_is_detected(corpus, tokenizer, tmp_path):
    config = write(tmp_path / "run.yaml", settings(corpus, str(tokenizer.path)))
    own = run_own(["--config", config, "--tst-bag-weights", "power_law"], tmp_path / "own")
    theirs = run_megatron_lm(["--config", config], tmp_path / "megatron-lm")
    assert distance(own, theirs) > 100 * TOLERANCE
