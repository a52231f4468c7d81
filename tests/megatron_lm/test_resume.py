"""A resumed run gives the same bits as a run without a stop, before, at and after the switch; others are refused."""

import shutil
from pathlib import Path

import pytest

from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.telemetry import read_metrics
from tests.checkpoint.test_stock import STOCK, differing, stored
from tests.corpora import write_corpus
from tests.megatron_lm.trainers import (
    losses,
    needs_trainer,
    refused,
    run_megatron_lm,
    run_own,
    settings,
    write,
)

pytestmark = [needs_trainer, pytest.mark.distributed]
SWITCH, STEPS = 4, 8


@pytest.fixture(scope="module")
def whole(corpus, tokenizer, tmp_path_factory) -> tuple[list[str], Path]:
    """Train a run without a stop that saves a checkpoint every second step; return its flags and its directory."""
    folder = tmp_path_factory.mktemp("whole")
    argv = ["--config", write(folder / "run.yaml", settings(corpus, str(tokenizer.path)))]
    run_megatron_lm([*argv, "--save-interval", "2"], folder / "run")
    return argv, folder / "run"


def copy_up_to(run: Path, step: int, target: Path) -> Path:
    """Copy a run directory and remove the checkpoints after a step from the copy."""
    shutil.copytree(run, target, symlinks=True)
    folders = CheckpointFolders(target / "checkpoints")
    for later in folders.steps():
        if later > step:
            shutil.rmtree(folders.of(later))
    folders.tracker.write_text(str(step))
    return target


def resume(argv: list[str], run: Path, *flags: str) -> list:
    return run_megatron_lm([*argv, "--save-interval", "2", "--load", str(run / "checkpoints"), *flags], run)


def last_of(run: Path):
    return stored(CheckpointFolders(run / "checkpoints").of(STEPS))


@pytest.mark.parametrize("step", [SWITCH - 2, SWITCH, SWITCH + 2])
def test_a_resumed_run_gives_the_same_bits(whole, tmp_path, step):
    argv, run = whole
    resumed = copy_up_to(run, step, tmp_path / "run")
    lines = resume(argv, resumed)
    again = [line for line in lines if "loss" in line and line["step"] > step]
    assert len(again) == STEPS - step
    assert losses(lines) == losses(read_metrics(run / "metrics.jsonl"))
    assert differing(last_of(resumed), last_of(run)) == []


def test_a_difference_of_bits_is_detected(whole):
    _, run = whole
    before = stored(CheckpointFolders(run / "checkpoints").of(STEPS - 2))
    assert len(differing(before, last_of(run))) > 20


def test_a_run_can_be_prolonged(whole, tmp_path):
    argv, run = whole
    resumed = copy_up_to(run, SWITCH, tmp_path / "run")
    lines = resume(argv, resumed, "--train-iters", "10", "--lr-decay-iters", "8")
    steps = [(line["step"], line["bag_size"]) for line in lines if "loss" in line]
    assert steps == [(step, 4 if step <= SWITCH else 1) for step in range(1, 11)]


def test_a_run_of_the_own_trainer_can_be_continued(whole, tmp_path):
    argv, run = whole
    own = run_own([*argv, "--exit-interval", str(SWITCH)], tmp_path / "run")
    lines = resume(argv, tmp_path / "run")
    assert max(line["step"] for line in own) == SWITCH
    assert losses(lines) == pytest.approx(losses(read_metrics(run / "metrics.jsonl")), abs=5e-6)


def test_the_own_trainer_can_start_from_its_weights(whole, tmp_path):
    argv, run = whole
    flags = ["--load", str(run / "checkpoints"), "--finetune", "--tst-bag-size", "1", "--tst-steps", "0"]
    lines = run_own([*argv, *flags], tmp_path / "next")
    last = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line][-1]
    assert lines[0]["loss"] < last + 0.3 < 5.7  # near the last loss of the run, not its first one
    fresh = ["--tst-bag-size", "1", "--tst-steps", "0"]
    assert run_own([*argv, *fresh], tmp_path / "fresh")[0]["loss"] > last + 0.5


@pytest.mark.parametrize(
    ("flags", "rule"),
    {
        "--tst-bag-size 2": "--tst-bag-size 2: the checkpoint was made with 4",
        "--tst-steps 5": "--tst-steps 5: the checkpoint was made with 4",
        "--tst-bag-weights power_law": "--tst-bag-weights power_law: the checkpoint was made with uniform",
        "--seed 3": "--seed 3: the checkpoint was made with 1234",
        "--split 80,20,0": "--split 80,20,0: the checkpoint was made with 90,10,0",
        "--eod-mask-loss": "--eod-mask-loss True: the checkpoint was made with False",
        "--global-batch-size 8": "--global-batch-size 8: the checkpoint was made with 4",
        "--data-path {other}": "--data-path {other}: is not the corpus",
        "--train-iters 4": "--train-iters 4: ends before the checkpoint's last phase begins",
    }.items(),
    ids=lambda value: value.split()[0] if value.startswith("--") and len(value) < 30 else "",
)
def test_another_run_is_refused_by_name(whole, tmp_path, flags, rule, tokenizer):
    argv, run = whole
    resumed = copy_up_to(run, SWITCH, tmp_path / "run")
    names = {}
    if "{other}" in flags:
        documents = [[(7 * place * place + 31 * number) % 256 for place in range(60)] for number in range(60)]
        names["other"] = write_corpus(tmp_path / "other", documents, tokenizer.vocab_size)
    load = ["--load", str(resumed / "checkpoints"), *flags.format(**names).split()]
    assert rule.format(**names) in refused([*argv, *load], resumed)


def test_a_foreign_checkpoint_is_refused_without_finetune(whole, tmp_path):
    argv, _ = whole
    reason = refused([*argv, "--load", str(STOCK / "0.19.2")], tmp_path / "run")
    assert "only its weights can be used, with --finetune" in reason


def test_used_folders_are_refused(whole, tmp_path):
    argv, run = whole
    assert "already holds a run" in refused(argv, run)
    reason = refused([*argv, "--save", str(run / "checkpoints")], tmp_path / "run")
    assert "already holds a run's checkpoints, of the steps [2, 4, 6, 8]" in reason
