"""Flags that cannot be combined with bags are refused by name, with the reason."""

from pathlib import Path
from unittest import mock

import pytest

from megatron_tst.config import UserError
from megatron_tst.megatron_lm.conflicts import CONFLICTS
from tests.distributed.launch import run_distributed
from tests.megatron_lm.trainers import needs_trainer, run_megatron_lm, settings, write

pytestmark = [needs_trainer, pytest.mark.distributed]

# Values of the flags that take one.
VALUES = {
    "--mtp-num-layers": "1",
    "--mtp-hybrid-override-pattern": "*-",
    "--tensor-parallel-num-weight-shards": "2",
    "--expert-tensor-parallel-num-weight-shards": "2",
    "--step-batch-size-schedule": "0:4",
    "--train-samples": "32",
    "--phase-transition-iterations": "4",
    "--iterations-to-skip": "3",
    "--data-args-path": "file",
    "--per-split-data-args-path": "file",
    "--test-data-path": "prefix",
    "--dataloader-type": "cyclic",
    "--yaml-cfg": "file",
    "--logits-save-dir": "folder",
    "--logits-load-dir": "folder",
}


def typed(flag: str) -> list[str]:
    return [*flag.split(), *VALUES.get(flag, "").split()]


def ask_all(argv: list[str], cases: list[list[str]]) -> list[str]:
    """Return the refusal of each command line, before anything is started; it is empty if there is none."""
    from megatron_tst.distributed import enter_device
    from megatron_tst.megatron_patches.cpu import enter_cpu_card

    device = enter_device()
    enter_cpu_card()
    from megatron_tst.megatron_lm.run import prepare

    answers = []
    for case in cases:
        try:
            prepare([*argv, *case], device)
            answers.append("")
        except UserError as error:
            answers.append(str(error))
    return answers


@pytest.fixture(scope="module")
def argv(corpus, tokenizer, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("conflicts")
    config = write(folder / "run.yaml", settings(corpus, str(tokenizer.path)))
    return ["--config", config, "--tst-run-dir", str(folder / "run")]


@pytest.fixture(scope="module")
def answers(argv) -> dict[str, str]:
    """Return the refusal of each conflict's flag."""
    flags = [conflict.flag for conflict in CONFLICTS]
    (answers,) = run_distributed(ask_all, 1, argv, [typed(flag) for flag in flags])
    return dict(zip(flags, answers, strict=True))


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda c: c.flag)
def test_a_conflict_is_refused_by_name(answers, conflict):
    said = answers[conflict.flag]
    assert said.startswith(conflict.flag), said
    assert said.endswith(f"cannot be combined with --tst-trainer megatron-lm: {conflict.reason}")
    assert "\n" not in said


def test_only_conflicts_are_refused(argv):
    """Control: a run with other flags is prepared, and conflicts are refused."""
    ((plain, beside, hybrid, deferred),) = run_distributed(
        ask_all,
        1,
        argv,
        [
            [
                "--dataloader-type",
                "single",
                "--no-save-rng",
                "--calculate-per-token-loss",
                "--cross-entropy-fusion-impl",
                "linear",
            ],
            ["--fp16"],
            ["--hybrid-layer-pattern", "*-/*-"],
            ["--cross-entropy-fusion-impl", "linear", "--defer-embedding-wgrad-compute"],
        ],
    )
    assert plain == ""
    assert beside.startswith("--fp16: ")
    assert hybrid.startswith("--hybrid-layer-pattern *-/*-: ")
    assert deferred.startswith(
        "--defer-embedding-wgrad-compute: cannot be combined with --cross-entropy-fusion-impl linear"
    )


def train_unexcluded(argv: list[str]) -> str:
    """Return the error of a run in which no conflict is refused."""
    from megatron_tst.megatron_lm import conflicts, train

    with mock.patch.object(conflicts, "CONFLICTS", ()):
        try:
            train([*argv, "--tst-trainer", "megatron-lm"])
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_multi_token_prediction_fails_with_bags(argv, tmp_path: Path):
    """If upstream starts to shift the axis of the sequence, this test fails and the conflict can be removed."""
    run = ["--tst-run-dir", str(tmp_path / "run"), "--mtp-num-layers", "1"]
    (met,) = run_distributed(train_unexcluded, 1, [*argv, *run])
    # Multi-token prediction shifts the bag as if it were the sequence.
    assert "The size of tensor a (4) must match the size of tensor b (16)" in met


def test_the_same_run_trains_without_multi_token_prediction(argv, tmp_path: Path):
    assert run_megatron_lm(argv[:2], tmp_path / "run")[-1]["step"] == 8
