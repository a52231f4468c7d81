#!/usr/bin/env python3
"""Compare two runs: final losses, text read, and when the second reaches the first one's final loss.

python tools/compare_runs.py RUN_A RUN_B [--output loss_curves.png]
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_tst.config import EXIT_CODE, UserError
from megatron_tst.telemetry import short
from megatron_tst.telemetry.compare import RunCurve, read_curve


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs=2, metavar="RUN", type=Path, help="run directories; the first is the baseline")
    parser.add_argument("--output", type=Path, default=Path("loss_curves.png"), help="picture to write")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    """Print the table and draw the picture."""
    from megatron_tst.telemetry.plots import draw_loss_curves

    baseline, other = map(read_curve, arguments.runs)
    console = Console()
    console.print(_table(baseline, other))
    console.print(_verdict(baseline, other), highlight=False, soft_wrap=True)
    draw_loss_curves([baseline, other], arguments.output)
    console.print(f"picture: {arguments.output}", highlight=False, soft_wrap=True)


def _table(baseline: RunCurve, other: RunCurve) -> Table:
    table = Table("", baseline.name, other.name)
    rows = (
        ("bag sizes", lambda curve: " then ".join(map(str, curve.bag_sizes))),
        ("steps", lambda curve: str(curve.num_steps)),
        ("positions computed", lambda curve: short(curve.positions)),
        ("data tokens read", lambda curve: short(curve.data_tokens)),
        ("final next-token loss (nats)", lambda curve: f"{curve.final_loss:.4f}"),
    )
    for name, value in rows:
        table.add_row(name, value(baseline), value(other))
    return table


def _verdict(baseline: RunCurve, other: RunCurve) -> str:
    difference = other.final_loss - baseline.final_loss
    lines = [
        f"{other.name} ends {abs(difference):.4f} nats {'below' if difference < 0 else 'above'} {baseline.name} "
        f"after {other.num_steps / baseline.num_steps:.3g} x its steps."
    ]
    reached = other.first_step_at(baseline.final_loss)
    if reached is None:
        lines.append(f"It does not reach {baseline.name}'s final loss.")
    else:
        lines.append(
            f"It first reaches {baseline.name}'s final loss at step {reached} of {other.num_steps} (evaluated steps "
            f"only): a lower bound on the speed-up, {baseline.num_steps / reached:.3g} x, because its learning rate "
            "had not decayed as far."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except UserError as error:
        print(f"compare_runs.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
