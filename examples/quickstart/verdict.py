#!/usr/bin/env python3
"""Describe the result of a quickstart's runs, and how reliable so few seeds are.

python examples/quickstart/verdict.py BASELINE TST [more runs]

seeds.csv beside this file holds the final losses of the same settings with five seeds.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_tst.analysis.compare import Estimate, Group, Method, SpeedUp, difference, find_methods, speed_ups
from megatron_tst.analysis.curves import AXES, RunCurve, read_curves
from megatron_tst.config import EXIT_CODE, UserError

MEASURED = Path(__file__).with_name("seeds.csv")


def read_measured() -> list[Method]:
    """Return the runs of seeds.csv, the baseline first."""
    with MEASURED.open(encoding="utf-8") as file:
        return find_methods(_curve(**row) for row in csv.DictReader(file))


def _curve(method: str, steps: str, seed: str, final_loss: str) -> RunCurve:
    """Return a curve that holds only a run's end; steps stand for FLOPs, as they cost the same in both methods."""
    return RunCurve(
        name=f"{method}-{steps}-seed{seed}",
        seed=int(seed),
        setting={},
        superposition=method,
        length=steps,
        losses=[float(final_loss)],
        axes={axis: [float(steps)] for axis in AXES},
        switches=[],
        bag_sizes=[],
        recovery=None,
    )


def sentences(baseline: Method, tst: Method) -> Iterator[str]:
    """Yield the result of the runs, and that of five other seeds."""
    longest, before = tst.groups[-1], baseline.groups[-1]
    gain = difference(longest, before)
    side = "below" if gain.value < 0 else "above"
    yield (
        f"TST ended {Estimate(abs(gain.value), gain.error).write(4)} nats per token {side} the baseline "
        f"({longest.final_loss.value:.4f} against {before.final_loss.value:.4f}), after equal steps and FLOPs."
    )
    needed = _steps_needed(baseline, tst)
    if needed:
        yield f"TST reached the baseline's loss in {needed}."
    elif len(tst.groups) > 1:
        yield "All TST runs end on one side of the baseline's loss, so the steps needed to reach it remain unknown."
    else:
        yield (
            "Runs of one length do not show how many steps TST needs to reach the baseline's loss; --equal-loss "
            "measures it."
        )
    yield _trust(before)


def _steps_needed(baseline: Method, tst: Method) -> str | None:
    """Describe the fraction of steps that TST needs for the baseline's loss, if two of its lengths enclose it."""
    for found in speed_ups(tst, baseline):
        if isinstance(found, SpeedUp) and found.anchor is baseline.groups[-1]:
            return f"{100 / found.ratio.value:.0f} % of the baseline's steps, a speed-up of {found.ratio.write(2)}"
    return None


def _trust(trained: Group) -> str:
    """Describe how much the gain varies between seeds."""
    baseline, tst = read_measured()
    before, after = baseline.groups[-1], tst.groups[-1]
    losses = {run.seed: run.final_loss for run in before.runs}
    gains = [losses[run.seed] - run.final_loss for run in after.runs]
    few = "one seed" if len(trained.runs) == 1 else f"{len(trained.runs)} seeds"
    told = (
        f"Reliability of {few}: with {len(gains)} seeds, {min(losses)} to {max(losses)}, the gain after "
        f"{before.num_steps} steps was {Estimate.of(gains).write(4)} nats, from {min(gains):.4f} to {max(gains):.4f}"
    )
    needed = _steps_needed(baseline, tst)
    told += f", and TST needed {needed}." if needed else "."
    if trained.num_steps != before.num_steps:
        told += f" This does not apply to runs of {trained.num_steps} steps."
    return told


def main(paths: list[Path]) -> None:
    """Print the sentences."""
    methods = find_methods(read_curves(paths))
    if len(methods) != 2:
        raise UserError(f"{' '.join(map(str, paths))}: must be runs of a baseline and of one TST setting")
    print("\n".join(sentences(*methods)))


if __name__ == "__main__":
    try:
        main([Path(name) for name in sys.argv[1:]])
    except UserError as error:
        print(f"verdict.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
