"""Every line that a run writes is valid JSON, even if its numbers are NaN."""

import math

import torch

from megatron_tst.telemetry import read_metrics
from megatron_tst.training import train
from tests.strict_json import read_strictly
from tests.training.runs import arguments, build_here


def test_a_model_of_nan_weights_writes_valid_json(here, corpus, tokenizer, tmp_path):
    extra = "--train-iters 2 --lr-warmup-iters 0 --eval-interval 1 --max-nan-steps 5"
    run = build_here(arguments(corpus, str(tokenizer.path), tmp_path / "run", extra))
    with torch.no_grad():
        for parameter in run.stepper.train_state.chunks[0].parameters():
            parameter.fill_(math.nan)
    train(run)
    written = [read_strictly(line) for line in run.directory.metrics.read_text().splitlines()]
    evaluations = [line for line in written if "valid_loss" in line]
    assert [line["not_finite"] for line in evaluations] == [{"valid_loss": "nan", "bits_per_byte": "nan"}] * 2
    assert all(line["valid_loss"] is None for line in evaluations)
    assert [math.isnan(line["valid_loss"]) for line in read_metrics(run.directory.metrics) if "valid_loss" in line] == [
        True,
        True,
    ]
