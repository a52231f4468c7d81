#!/usr/bin/env python3
"""Say in words what a quickstart's runs show, and how far so few seeds can be trusted.

python examples/quickstart/verdict.py BASELINE TST [more runs]

seeds.csv beside this file has the final losses of the same settings with five seeds.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from megatron_tst.config import EXIT_CODE, UserError
from megatron_tst.telemetry.compare import Estimate, Group, Method, SpeedUp, difference, find_methods, speed_ups
from megatron_tst.telemetry.curves import read_curves

MEASURED = Path(__file__).with_name("seeds.csv")
# Final loss of each seed, by method and number of steps.
Losses = dict[tuple[str, int], dict[int, float]]


def read_measured() -> Losses:
    """Return the final losses of seeds.csv."""
    losses: Losses = defaultdict(dict)
    with MEASURED.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            losses[row["method"], int(row["steps"])][int(row["seed"])] = float(row["final_loss"])
    return losses


def sentences(baseline: Method, tst: Method) -> Iterator[str]:
    """Yield what the runs show, and what five other seeds showed."""
    long, longest = baseline.groups[-1], tst.groups[-1]
    gain = difference(longest, long)
    side = "below" if gain.value < 0 else "above"
    told = Estimate(abs(gain.value), gain.error).write(4)
    yield (
        f"TST ended {told} nats per token {side} the baseline ({longest.final_loss.value:.4f} against "
        f"{long.final_loss.value:.4f}), after as many steps and FLOPs."
    )
    yield _steps_needed(baseline, tst)
    yield _trust(long, len(longest.runs))


def _steps_needed(baseline: Method, tst: Method) -> str:
    for found in speed_ups(tst, baseline):
        if isinstance(found, SpeedUp) and found.anchor in baseline.groups:
            share = 100 / found.ratio.value
            return f"TST reached the baseline's loss in {share:.0f} % of its steps: {found.ratio.write(2)} times fewer."
    if len(tst.groups) > 1:
        return "The shorter TST runs end on one side of the baseline's loss: how many steps reach it stays open."
    return "In how many steps TST reaches the baseline's loss, runs of one length do not tell: --equal-loss does."


def _trust(baseline: Group, num_seeds: int) -> str:
    losses = read_measured()
    steps = max(steps for _, steps in losses)
    before, after = losses["baseline", steps], losses["tst", steps]
    gains = [before[seed] - after[seed] for seed in sorted(before)]
    few = "one seed" if num_seeds == 1 else f"{num_seeds} seeds"
    told = (
        f"How far to trust {few}: in runs of {steps} steps with {len(gains)} seeds, {min(before)} to {max(before)}, "
        f"the gain was {Estimate.of(gains).write(4)} nats, from {min(gains):.4f} to {max(gains):.4f}."
    )
    if baseline.num_steps != steps:
        told += f" Runs of {baseline.num_steps} steps are not those."
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
