#!/usr/bin/env python3
"""Compare finished runs at equal FLOPs, equal data and equal loss.

    python tools/compare_runs.py BASELINE RUN [more runs] [--output loss_curves.png] [--report report.md]

Runs that differ only in their seed are averaged; runs of several lengths also give a speed-up at equal loss.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_tst.analysis.compare import find_methods
from megatron_tst.analysis.curves import AXES, read_curves
from megatron_tst.analysis.verdict import CAPTION, COLUMNS, report, sentences, table_rows
from megatron_tst.config import EXIT_CODE, UserError
from megatron_tst.telemetry.outputs import check_output, check_picture, writing_output


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run directories, the baseline first")
    parser.add_argument("--output", type=Path, default=Path("loss_curves.png"), help="plot to write, PNG or SVG")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=["steps", "data_tokens", "gpu_hours"])
    parser.add_argument("--report", type=Path, help="also write the comparison as Markdown")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    """Print the table and the verdict, and draw the plot."""
    check_picture(arguments.output, "--output")
    if arguments.report:
        check_output(arguments.report, "--report")
    from megatron_tst.analysis.plots import draw_comparison

    methods = find_methods(read_curves(arguments.runs))
    console = Console()
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column(COLUMNS[0], overflow="fold", min_width=9)
    for column in COLUMNS[1:]:
        # A header may wrap to two lines, but a number must not.
        table.add_column(column.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for row in table_rows(methods):
        table.add_row(*row)
    console.print(table)
    console.print(CAPTION, highlight=False, soft_wrap=True)
    console.print("\n".join(sentences(methods)), highlight=False, soft_wrap=True)
    with writing_output(arguments.output, "--output"):
        draw_comparison(methods, arguments.output, arguments.axes)
    console.print(f"plot: {arguments.output}", highlight=False, soft_wrap=True)
    if arguments.report:
        picture = os.path.relpath(arguments.output, arguments.report.parent)
        with writing_output(arguments.report, "--report"):
            arguments.report.write_text(report(methods, picture), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except UserError as error:
        print(f"compare_runs.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
