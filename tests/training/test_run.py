"""Runs started from the command line, as a user does: across the switch, and with mistakes."""

import json
import math
from pathlib import Path

import pytest

from megatron_tst.config import parse_config
from megatron_tst.superposition import Phase
from megatron_tst.telemetry import read_metrics
from tests.training.runs import arguments, start, train_here

SUPERPOSED = "--tst-bag-size 4 --tst-steps 4"


@pytest.fixture
def argv(corpus, tokenizer, tmp_path: Path):
    return lambda extra="": arguments(corpus, str(tokenizer.path), tmp_path / "run", extra)


def test_a_run_across_the_switch_writes_all_its_files(argv, tmp_path: Path):
    done = start("pretrain_tst.py", *argv(f"{SUPERPOSED} --log-interval 3"))
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    # Every third step, the last step of each phase and the last step of the run.
    assert [line["step"] for line in steps] == [3, 4, 6, 8]
    assert [(line["phase"], line["bag_size"], line["loss_kind"]) for line in steps] == [
        (0, 4, "mce"), (0, 4, "mce"), (1, 1, "ce"), (1, 1, "ce")
    ]  # fmt: skip
    positions = 4 * 16
    assert [line["positions"] for line in steps] == [step * positions for step in (3, 4, 6, 8)]
    assert [line["data_tokens"] for line in steps] == [n * positions for n in (12, 16, 18, 20)]
    assert [line["step"] for line in lines if "valid_loss" in line] == [4, 8]
    assert all(line["step_time_s"] > 0 and line["tflops_per_gpu"] > 0 for line in steps)
    resolved = parse_config(["--config", str(tmp_path / "run" / "config.yaml")])
    assert resolved.schedule.phases == (Phase(4, 4), Phase(1, 4))
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["torch"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "using: CPU" in log and "phase 1: 4 steps, bag size 4" in log
    assert "Warning" not in done.stderr


def test_the_loss_falls_on_real_text(here, corpus, tokenizer, tmp_path: Path):
    extra = "--train-iters 60 --tst-bag-size 2 --tst-step-ratio 0.3 --eval-interval 60 --global-batch-size 8"
    run = train_here(arguments(corpus, str(tokenizer.path), tmp_path / "run", extra))
    lines = read_metrics(run.directory.metrics)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(5.7, abs=0.3)  # log 300, a uniform guess
    assert losses[-1] < 4.5
    assert lines[-1]["valid_loss"] < 4.7


def test_deterministic_mode_gives_the_same_losses(here, corpus, tokenizer, tmp_path: Path):
    """Every operation of a step supports the mode."""

    def losses(name: str) -> list[float]:
        return [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]

    plain, told = (arguments(corpus, str(tokenizer.path), tmp_path / name, SUPERPOSED) for name in ("plain", "told"))
    train_here(plain)
    done = start("pretrain_tst.py", *told, "--deterministic-mode")
    assert done.returncode == 0, done.stderr
    assert losses("told") == pytest.approx(losses("plain"), rel=1e-6)
    assert losses("told") != pytest.approx(losses("plain")[::-1], rel=1e-3)


VARIANTS = {
    "--tst-superpose input": (4, "mce"),
    "--tst-superpose output": (1, "mce"),
    "--tst-objective mce_alt": (4, "mce_alt"),
}


@pytest.mark.parametrize("extra", VARIANTS)
def test_each_variant_of_the_paper_takes_one_setting(here, corpus, tokenizer, tmp_path: Path, extra):
    run = train_here(arguments(corpus, str(tokenizer.path), tmp_path / "run", f"{SUPERPOSED} {extra}"))
    lines = [line for line in read_metrics(run.directory.metrics) if "loss" in line]
    tokens_per_position, kind = VARIANTS[extra]
    assert lines[3]["data_tokens"] == 4 * 4 * 16 * tokens_per_position
    assert [line["loss_kind"] for line in lines] == [kind] * 4 + ["ce"] * 4
    # A uniform guess costs log 300 per token, or log 300 - log 4 if any of the bag's four tokens counts as correct.
    expected = math.log(300) - (math.log(4) if kind == "mce_alt" else 0)
    assert lines[0]["loss"] == pytest.approx(expected, abs=0.3)


MISTAKES = {
    "--tst-bag-size 0": "--tst-bag-size 0: must be above 0",
    "--seq-length 15 --tensor-model-parallel-size 2 --sequence-parallel": "--seq-length 15",
    "--reset-attention-mask": "--reset-attention-mask: is not supported",
    "--tensor-model-parallel-size 2": "1 ranks cannot hold --tensor-model-parallel-size 2",
    "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te": "Transformer Engine is not usable; supported",
    "--data-path nowhere": "nowhere.bin does not exist",
    "--vocab-size 299": "--vocab-size 299: must be at least the tokenizer's 300",
    "--tokenizer-model nowhere": "--tokenizer-model nowhere: must be",
    "--global-batch-size 6 --micro-batch-size 4": "--global-batch-size 6: must be a multiple",
}


@pytest.mark.parametrize("extra", MISTAKES)
def test_a_mistake_prints_one_line_and_exits_with_two(argv, tmp_path: Path, extra):
    done = start("pretrain_tst.py", *argv(extra))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("pretrain_tst.py: error: ")
    assert MISTAKES[extra] in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_used_run_directory_is_refused(argv, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    done = start("pretrain_tst.py", *argv())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "already holds a run" in done.stderr
