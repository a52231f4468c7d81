#!/usr/bin/env python3
"""Say in words what a quickstart's runs show, and how far so few seeds can be trusted.

python examples/quickstart/verdict.py BASELINE TST [more runs]

seeds.csv beside this file has the final losses of the same settings with five seeds.
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
    """Return the runs of seeds.csv, the baseline's first."""
    with MEASURED.open(encoding="utf-8") as file:
        return find_methods(_curve(**row) for row in csv.DictReader(file))


def _curve(method: str, steps: str, seed: str, final_loss: str) -> RunCurve:
    """Describe a run by its end; a step of either method costs the same FLOPs."""
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
    """Yield what the runs show, and what five other seeds showed."""
    longest, before = tst.groups[-1], baseline.groups[-1]
    gain = difference(longest, before)
    side = "below" if gain.value < 0 else "above"
    yield (
        f"TST ended {Estimate(abs(gain.value), gain.error).write(4)} nats per token {side} the baseline "
        f"({longest.final_loss.value:.4f} against {before.final_loss.value:.4f}), after as many steps and FLOPs."
    )
    needed = _steps_needed(baseline, tst)
    if needed:
        yield f"TST reached the baseline's loss in {needed}."
    elif len(tst.groups) > 1:
        yield "The shorter TST runs end on one side of the baseline's loss: how many steps reach it stays open."
    else:
        yield "In how many steps TST reaches the baseline's loss, runs of one length do not tell: --equal-loss does."
    yield _trust(before)


def _steps_needed(baseline: Method, tst: Method) -> str | None:
    """Tell in which share of its steps TST ends at the baseline's final loss, if two of its lengths enclose that."""
    for found in speed_ups(tst, baseline):
        if isinstance(found, SpeedUp) and found.anchor is baseline.groups[-1]:
            return f"{100 / found.ratio.value:.0f} % of its steps, a speed-up of {found.ratio.write(2)}"
    return None


def _trust(trained: Group) -> str:
    """Tell how much the gain varies from seed to seed."""
    baseline, tst = read_measured()
    before, after = baseline.groups[-1], tst.groups[-1]
    losses = {run.seed: run.final_loss for run in before.runs}
    gains = [losses[run.seed] - run.final_loss for run in after.runs]
    few = "one seed" if len(trained.runs) == 1 else f"{len(trained.runs)} seeds"
    told = (
        f"How far to trust {few}: with {len(gains)} seeds, {min(losses)} to {max(losses)}, the gain after "
        f"{before.num_steps} steps was {Estimate.of(gains).write(4)} nats, from {min(gains):.4f} to {max(gains):.4f}"
    )
    needed = _steps_needed(baseline, tst)
    told += f", and TST needed {needed}." if needed else "."
    if trained.num_steps != before.num_steps:
        told += f" Runs of {trained.num_steps} steps are not those."
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
