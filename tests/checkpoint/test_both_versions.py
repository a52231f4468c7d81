"""A run gives the same numbers under every supported version of megatron-core, and each resumes the others' runs."""

import json

import pytest

from tests.checkpoint.numbers import LAYOUTS, NUMBERS, compute
from tests.checkpoint.recorded_run import ONE_RANK, RECORDED, SAVED_STEP, TWO_RANKS, arguments
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import train_layout

pytestmark = pytest.mark.distributed
VERSIONS = sorted(folder.name for folder in RECORDED.iterdir())
METRICS = json.loads((RECORDED / VERSIONS[0] / "metrics.json").read_text())


def differs(outcome, start: int = 0) -> float:
    """Return the largest relative difference of losses and gradient norms from the recorded run."""
    pairs = [*zip(outcome.losses, METRICS["loss"][start:], strict=True)]
    pairs += zip(outcome.grad_norms, METRICS["grad_norm"][start:], strict=True)
    pairs += zip(outcome.valid, METRICS["valid"], strict=True)
    return max(abs(ours - recorded) / recorded for ours, recorded in pairs)


def test_both_versions_are_recorded():
    assert VERSIONS == ["0.16.1", "0.19.2"]
    assert sum(path.stat().st_size for path in RECORDED.rglob("*")) < 600_000


def test_installed_version_trains_as_the_recorded_one(tmp_path):
    outcome = run_distributed(train_layout, 2, arguments(tmp_path, "run", TWO_RANKS))[0]
    assert differs(outcome) < 1e-6
    other_seed = run_distributed(train_layout, 2, arguments(tmp_path, "other", f"{TWO_RANKS} --seed 7"))[0]
    assert differs(other_seed) > 1e-3


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, ONE_RANK, id="dp2"),
        pytest.param(2, TWO_RANKS, id="tp2"),
        pytest.param(4, TWO_RANKS, id="tp2-dp2", marks=pytest.mark.long),
        pytest.param(1, ONE_RANK, id="one rank", marks=pytest.mark.long),
        pytest.param(
            2, f"{ONE_RANK} --overlap-grad-reduce --overlap-param-gather", id="overlap", marks=pytest.mark.long
        ),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_installed_version_resumes_checkpoints_of_each_version(tmp_path, version, ranks, flags):
    argv = [*arguments(tmp_path, "run", flags), "--load", str(RECORDED / version)]
    assert differs(run_distributed(train_layout, ranks, argv)[0], SAVED_STEP) < 1e-6


def test_run_without_the_saved_moments_differs(tmp_path):
    argv = [*arguments(tmp_path, "run", ONE_RANK), "--load", str(RECORDED / VERSIONS[0]), "--no-load-optim"]
    assert differs(run_distributed(train_layout, 1, argv)[0], SAVED_STEP) > 1e-4


def largest_difference(found: dict, written: dict) -> float:
    pairs = [pair for name in written for pair in zip(found[name], written[name], strict=True)]
    return max(abs(float.fromhex(ours) / float.fromhex(theirs) - 1) for ours, theirs in pairs)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_the_recorded_numbers(layout):
    """Both versions gave these numbers, bitwise with one torch; another torch or processor may round differently."""
    found, written = compute(layout), json.loads(NUMBERS.read_text())
    limit = 1e-2 if "bf16" in layout else 1e-6
    assert largest_difference(found, written[layout]) < limit
    other = "one rank" if "dropout" in layout else "one rank, dropout"
    assert largest_difference(found, written[other]) > limit
