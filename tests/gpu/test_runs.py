"""Runs from the command line across the switch in bfloat16: saved, resumed and repeated in deterministic mode."""

import math
from pathlib import Path

import pytest

from megatron_tst.distributed import enter_device
from megatron_tst.telemetry import read_metrics
from tests.training.runs import TRAINING, start

MODEL = (
    "--num-layers 2 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 64 --swiglu --normalization RMSNorm --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 "
    "--bf16 --accumulate-allreduce-grads-in-fp32 --use-distributed-optimizer --tst-bag-size 4 --tst-steps 4"
).split()
GENTLE = ("--lr", "3e-3")  # keeps the effect of rounding small over eight steps
DETERMINISTIC = ("--deterministic-mode", "--save-interval", "3")


@pytest.fixture(scope="module")
def train(corpus, tokenizer, tmp_path_factory):
    """Return a function that trains a run once and returns its step lines."""
    folder: Path = tmp_path_factory.mktemp("runs")
    known = {}

    def train(name: str, *flags: str) -> list[dict]:
        if name not in known:
            files = [
                "--data-path",
                corpus,
                "--tokenizer-model",
                str(tokenizer.path),
                "--tst-run-dir",
                str(folder / name),
            ]
            load = ["--load", str(folder / "first/checkpoints"), "--ckpt-step", "3"] if name == "resumed" else []
            done = start("pretrain_tst.py", *MODEL, *TRAINING, *GENTLE, *files, *load, *flags)
            assert done.returncode == 0, done.stderr
            assert enter_device().name in (folder / name / "log.txt").read_text()
            known[name] = [line for line in read_metrics(folder / name / "metrics.jsonl") if "loss" in line]
        return known[name]

    return train


def numbers(lines: list[dict]) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in lines]


def test_a_run_trains_across_the_switch(cuda, train, record_property):
    lines = train("ordinary")
    assert [line["bag_size"] for line in lines] == [4] * 4 + [1] * 4
    assert all(math.isfinite(value) for pair in numbers(lines) for value in pair)
    assert lines[0]["loss"] == pytest.approx(math.log(300), abs=0.3)  # a uniform guess
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    record_property("last loss", lines[-1]["loss"])
    record_property("last step_time_s", lines[-1]["step_time_s"])


def test_a_resumed_run_gives_the_same_bits(train, record_property):
    alone, resumed = train("first", *DETERMINISTIC), train("resumed", *DETERMINISTIC)
    assert len(alone) == 8
    assert numbers(resumed) == numbers(alone)[3:]
    assert numbers(resumed) != numbers(alone)[:5]
    record_property("losses", " ".join(f"{loss:.6f}" for loss, _ in numbers(alone)))


def test_deterministic_mode_gives_the_same_bits_twice(cuda, train):
    assert numbers(train("second", *DETERMINISTIC)) == numbers(train("first", *DETERMINISTIC))


def test_deterministic_mode_gives_the_same_losses_as_ordinary_mode(cuda, train):
    ordinary, deterministic = (
        [line["loss"] for line in lines] for lines in (train("ordinary"), train("first", *DETERMINISTIC))
    )
    assert deterministic == pytest.approx(ordinary, abs=5e-2)
