"""Every parallel layout gives the losses of one rank, from the same weights and across the switch."""

from pathlib import Path
from typing import Any

import pytest

from tests.megatron_lm.trainers import EXPERTS, distance, needs_trainer, run_megatron_lm, run_own, settings, write

pytestmark = [needs_trainer, pytest.mark.distributed]
TOLERANCE = 1e-5

LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "tp2-sp": ({}, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2-interleaved": ({}, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
}
MORE: dict[str, tuple[dict[str, Any], str]] = {
    "tp2": ({}, "--tensor-model-parallel-size 2"),
    "pp2": ({}, "--pipeline-model-parallel-size 2"),
    "cp2": ({}, "--context-parallel-size 2"),
    "ep2": (EXPERTS, "--expert-model-parallel-size 2"),
    "tp2-sp-experts": (EXPERTS, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "dp2": ({}, ""),
    "dp2-distributed-optimizer": ({}, "--use-distributed-optimizer"),
    "dp2-overlap": ({}, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "dp2-per-token": ({}, "--calculate-per-token-loss"),
    "cp2-per-token": ({}, "--context-parallel-size 2 --calculate-per-token-loss"),
}


def train(corpus, tokenizer, folder: Path, model: dict[str, Any], flags: str):
    """Train the run on one rank and on two, both from the weights of one checkpoint, and return their metrics."""
    sections = settings(
        corpus, str(tokenizer.path), model={"num_layers": 4, **model}, training={"micro_batch_size": 1},
        data={"eod_mask_loss": True}, superposition={"tst_bag_weights": "power_law"},
    )  # fmt: skip
    argv = ["--config", write(folder / "run.yaml", sections)]
    run_own([*argv, "--train-iters", "1", "--tst-steps", "1", "--lr-warmup-iters", "0"], folder / "start")
    argv += ["--load", str(folder / "start" / "checkpoints"), "--finetune"]
    # The padding of the vocabulary depends on the layout, and loaded weights must fit: both pad 300 tokens to 384.
    two = "64" if "--tensor" in flags else "128"
    return (
        run_megatron_lm([*argv, "--make-vocab-size-divisible-by", "128"], folder / "one"),
        run_megatron_lm([*argv, "--make-vocab-size-divisible-by", two, *flags.split()], folder / "two", ranks=2),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_losses_of_one_rank(corpus, tokenizer, tmp_path, layout):
    one, two = train(corpus, tokenizer, tmp_path, *LAYOUTS[layout])
    assert distance(one, two) <= TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("layout", MORE)
def test_every_layout_gives_the_losses_of_one_rank(corpus, tokenizer, tmp_path, layout):
    one, two = train(corpus, tokenizer, tmp_path, *MORE[layout])
    assert distance(one, two) <= TOLERANCE


def test_another_run_is_detected(corpus, tokenizer, tmp_path):
    config = write(tmp_path / "run.yaml", settings(corpus, str(tokenizer.path)))
    one = run_megatron_lm(["--config", config], tmp_path / "one")
    two = run_megatron_lm(["--config", config, "--seed", "5"], tmp_path / "two", ranks=2)
    assert distance(one, two) > 100 * TOLERANCE
