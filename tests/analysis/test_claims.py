"""The verdict on a claim follows from the differences between runs of the same seeds, and from their noise."""

from pathlib import Path
from statistics import stdev

import pytest

from megatron_tst.analysis.claims import HELD, LIMIT, NOISE, NOT_HELD, NOT_RUN, Below, Optimum, Same, by_setting
from megatron_tst.analysis.sweep_results import read_result
from tests.telemetry.finished import write_run


@pytest.fixture
def runs(tmp_path: Path):
    """Return a function that creates the runs of settings from the final losses of seeds 1, 2, ..."""

    def make(**losses):
        for name, ends in losses.items():
            for seed, end in enumerate(ends, start=1):
                write_run(tmp_path / f"{name}-seed{seed}", [4.0, end], seed=seed)
        # This call returns the runs of earlier calls too.
        return by_setting([read_result(path) for path in sorted(tmp_path.iterdir())])

    return make


def test_runs_are_sorted_by_setting(tmp_path: Path):
    for name in ("s4-r0.3-seed1", "s4-r0.3-seed12", "s4-r0.3-40steps-seed2", "baseline-seed1"):
        write_run(tmp_path / name, [4.0, 3.0], seed=int(name.rpartition("seed")[2]))
    found = by_setting([read_result(path) for path in tmp_path.iterdir()])
    assert {name: sorted(seeds) for name, seeds in found.items()} == {"s4-r0.3": [1, 2, 12], "baseline": [1]}


@pytest.mark.parametrize(
    ("lower", "verdict"),
    [
        # The differences -0.10, -0.11, -0.12 are 19 standard errors below zero, although seeds scatter by a whole nat.
        ([1.90, 2.89, 1.38], HELD),
        ([2.10, 3.11, 1.62], NOT_HELD),
        # The differences -0.30, 0.01, -0.04 are 1.1 standard errors from zero.
        ([1.70, 3.01, 1.46], NOISE),
        # Two similar differences are 21 standard errors from zero, but two seeds are too few.
        ([1.90, 2.89], NOISE),
        ([1.90], NOISE),
        ([], NOT_RUN),
    ],
)
def test_below_is_judged_by_pairs(runs, lower, verdict):
    found = Below("", "a", "b").judge(runs(a=lower, b=[2.0, 3.0, 1.5]))
    assert found.verdict == verdict
    expected = {HELD: "a minus b: -0.1100 ± 0.0058", NOT_RUN: "no seed has finished runs of both a and b"}
    assert found.evidence == expected.get(verdict, found.evidence)
    assert ("of at least 3 seeds" in found.evidence) == (len(lower) in (1, 2))


def test_the_limit_is_three_standard_errors(runs):
    """Four differences with a standard deviation of 0.1 have a mean with a standard error of 0.05."""
    deviations = [0.1 * 3**0.5 / 2 * sign for sign in (1, 1, -1, -1)]
    beyond, within = ([2.0 - LIMIT * 0.05 - shift + deviation for deviation in deviations] for shift in (0.001, -0.001))
    made = runs(beyond=beyond, within=within, b=[2.0] * 4)
    assert "± 0.0500" in Below("", "beyond", "b").judge(made).evidence
    assert [Below("", name, "b").judge(made).verdict for name in ("beyond", "within")] == [HELD, NOISE]


def test_equality_is_reported_with_the_detectable_difference(runs):
    gaps = [0.02, -0.01, 0.0]
    alike = [end + gap for end, gap in zip((2.0, 3.0, 1.5), gaps, strict=True)]
    made = runs(a=alike, b=[2.0, 3.0, 1.5], c=[2.2, 3.21, 1.71])
    found, error = Same("", "a", "b").judge(made), stdev(gaps) / 3**0.5
    shown = f"a difference above {3 * error:.4f} would have been detected"
    assert (found.verdict, found.evidence) == (HELD, f"a minus b: +0.0033 ± {error:.4f}; {shown}")
    assert Same("", "c", "b").judge(made).verdict == NOT_HELD
    assert Same("", "gone", "b").judge(made).verdict == NOT_RUN
    assert Same("", "two", "b").judge(runs(two=[2.0, 3.0])).verdict == NOISE


def test_an_optimum_must_be_below_all_outer_settings(runs):
    made = runs(
        low=[2.5, 3.51, 2.0], best=[2.0, 3.0, 1.51], good=[2.01, 3.02, 1.5], high=[2.3, 3.3, 1.8],
        near=[2.2, 2.9, 1.51], under=[1.8, 2.81, 1.3],
    )  # fmt: skip
    held = Optimum("", ("good", "best"), ("low", "high")).judge(made)
    assert (held.verdict, held.evidence.count("best minus ")) == (HELD, 2)
    assert Optimum("", ("good", "best"), ("low", "near")).judge(made).verdict == NOISE
    assert Optimum("", ("good", "best"), ("near", "under")).judge(made).verdict == NOT_HELD
    missing = Optimum("", ("good", "gone"), ("low", "lost")).judge(made)
    assert (missing.verdict, missing.evidence) == (NOT_RUN, "no run of gone, lost has finished")
