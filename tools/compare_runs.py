#!/usr/bin/env python3
"""Compare runs with a baseline: final losses, text read, time, and the speed-up at equal loss.

python tools/compare_runs.py BASELINE RUN [more runs] [--output loss_curves.png] [--report report.md]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_tst.config import EXIT_CODE, UserError
from megatron_tst.telemetry import short
from megatron_tst.telemetry.compare import RunCurve, Standing, compare, read_curve, speed_up_at_equal_loss

ROWS = (
    ("bag sizes", lambda curve: " then ".join(map(str, curve.bag_sizes))),
    ("steps", lambda curve: str(curve.num_steps)),
    ("positions computed", lambda curve: short(curve.positions)),
    ("data tokens read", lambda curve: short(curve.data_tokens)),
    ("hours of training", lambda curve: f"{curve.hours:.3g}"),
    ("final next-token loss (nats)", lambda curve: f"{curve.final_loss:.4f}"),
)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("baseline", metavar="BASELINE", type=Path, help="run directory")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run directories")
    parser.add_argument("--output", type=Path, default=Path("loss_curves.png"), help="picture to write, PNG or SVG")
    parser.add_argument("--axes", nargs="+", choices=("steps", "data_tokens", "hours"), default=["steps"])
    parser.add_argument("--report", type=Path, help="write the comparison as Markdown too")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    """Print the table and draw the picture."""
    from megatron_tst.telemetry.plots import draw_loss_curves

    baseline, *others = curves = [read_curve(path) for path in (arguments.baseline, *arguments.runs)]
    lines = _verdict(baseline, compare(baseline, others))
    console = Console()
    table = Table("", *(curve.name for curve in curves))
    for name, value in ROWS:
        table.add_row(name, *map(value, curves))
    console.print(table)
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    draw_loss_curves(curves, arguments.output, arguments.axes)
    console.print(f"picture: {arguments.output}", highlight=False, soft_wrap=True)
    if arguments.report:
        arguments.report.write_text(_report(curves, lines, arguments.output), encoding="utf-8")


def _verdict(baseline: RunCurve, standings: Sequence[Standing]) -> list[str]:
    lines = []
    for standing in standings:
        name, side = standing.curve.name, "below" if standing.difference < 0 else "above"
        lines.append(
            f"{name} ends {abs(standing.difference):.4f} nats {side} {baseline.name} after {standing.steps:.3g} x its "
            f"steps and {standing.data_tokens:.3g} x its data tokens."
        )
        if standing.first_reached is None:
            lines.append(f"  It does not reach {baseline.name}'s final loss.")
        else:
            lines.append(
                f"  It first reaches {baseline.name}'s final loss at step {standing.first_reached} of "
                f"{standing.curve.num_steps} (evaluated steps only): a lower bound on the speed-up, "
                f"{baseline.num_steps / standing.first_reached:.3g} x, because its learning rate "
                "had not decayed as far."
            )
    return [*lines, *_equal_loss(standings)]


def _equal_loss(standings: Sequence[Standing]) -> list[str]:
    """Say what runs that each end their own decay show; one run alone shows it only if it is shorter."""
    speed_up = speed_up_at_equal_loss(standings)
    if speed_up is None or (speed_up[0] <= 1 and speed_up[1] is None):
        return []
    at_least, less_than = speed_up
    bound = "" if less_than is None else f" and less than {less_than:.3g} x"
    return [f"Speed-up at equal loss, from runs at the end of their own decay: at least {at_least:.3g} x{bound}."]


def _report(curves: Sequence[RunCurve], lines: Sequence[str], picture: Path) -> str:
    head = ["", *(curve.name for curve in curves)]
    rows = [[name, *map(value, curves)] for name, value in ROWS]
    table = [head, ["---"] * len(head), *rows]
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    verdict = "\n".join(f"- {line.strip()}" for line in lines)
    return f"# {curves[0].name} and {len(curves) - 1} other runs\n\n{text}\n\n{verdict}\n\n![loss curves]({picture})\n"


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except UserError as error:
        print(f"compare_runs.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
