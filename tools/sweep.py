#!/usr/bin/env python3
r"""Train a grid over bag size s, step ratio r and bag weights on one machine, and draw final loss over s.

    python tools/sweep.py --output runs/sweep --bag-sizes 2 4 8 --step-ratios 0.2 0.3 --seeds 1 2 --workers 2 \
        --config examples/quickstart/config.yaml [flags of pretrain_tst.py]
    python tools/sweep.py --output runs/sweep --draw runs/270m-s*           runs that are there, from a cluster say

The baseline is always run. The same command goes on where it was stopped. Results: sweep.csv and u_curves.png.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_tst.config import EXIT_CODE, UserError
from megatron_tst.config.locks import locked
from megatron_tst.planning.sweep import (
    NOT_STARTED,
    Runner,
    SweepResult,
    SweepRun,
    losses_by_point,
    plan_sweep,
    read_result,
)
from megatron_tst.platform.device import visible_gpus
from megatron_tst.telemetry.outputs import check_picture, writing_output

PICTURE = "u_curves.png"
PROGRAM = Path(__file__).parents[1] / "pretrain_tst.py"


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read this program's flags; the rest are pretrain_tst.py's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run directories and the results")
    parser.add_argument("--bag-sizes", type=int, nargs="+", default=[2, 4, 6, 8], metavar="S")
    parser.add_argument("--step-ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4], metavar="R")
    parser.add_argument("--bag-weights", nargs="+", default=["uniform"], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--workers", type=int, help="runs at a time (default: one per GPU, without one 1)")
    parser.add_argument("--draw", type=Path, nargs="+", metavar="RUN", help="train nothing; draw these run directories")
    return parser.parse_known_args()


def main(arguments: argparse.Namespace, flags: list[str]) -> int:
    """Train what is not trained yet, then show all; return the exit code."""
    if arguments.draw:
        if flags:
            raise UserError(f"{flags[0]}: is not taken with --draw, which trains nothing")
        make_folder(arguments.output)
        with locked(arguments.output / "sweep", f"--output {arguments.output}"):
            show([read_result(path) for path in arguments.draw], arguments.output)
        return 0
    runs = plan_sweep(
        arguments.bag_sizes, arguments.step_ratios, arguments.bag_weights, arguments.seeds, arguments.output, flags
    )
    gpus = visible_gpus()
    workers = max(len(gpus), 1) if arguments.workers is None else arguments.workers
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    make_folder(arguments.output)
    with locked(arguments.output / "sweep", f"--output {arguments.output}"):
        return train_and_show(runs, Runner(PROGRAM, workers, gpus), arguments.output)


def train_and_show(runs: Sequence[SweepRun], runner: Runner, output: Path) -> int:
    """Train the missing runs, then show all that ended; return the exit code."""
    missing = [run for run in runs if not run.is_complete]
    print(f"{len(runs)} runs, {len(missing)} of them to train, {runner.workers} at a time", flush=True)
    is_done = train(missing, runner)
    ended = [read_result(run.directory.path) for run in runs if run.is_complete]
    if ended:
        show(ended, output)
    return 0 if is_done else 1


def make_folder(folder: Path) -> None:
    """Make the folder of the results, once it is known that they can be drawn."""
    check_picture(folder / PICTURE, "--output")


def train(runs: Sequence[SweepRun], runner: Runner) -> bool:
    """Train, telling how each run ends; return whether all did."""
    console = Console(stderr=True)
    columns = (
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    num_ended = num_waiting = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(runs))
        for run, failure in runner.run_all(runs):
            progress.update(task, advance=1, description=f"training {', '.join(runner.running)}")
            if failure == NOT_STARTED:
                num_waiting += 1
                continue
            told = f"did not end: {failure}"
            if failure is None:
                try:
                    told = f"final loss {read_result(run.directory.path).final_loss:.4f}"
                    num_ended += 1
                except UserError as error:
                    told = f"did not end: {error}"
            console.print(f"{run.name}: {told}", highlight=False, soft_wrap=True)
    if num_waiting:
        console.print(f"{num_waiting} other runs were not started")
    return num_ended == len(runs)


def show(results: Sequence[SweepResult], output: Path) -> None:
    """Write sweep.csv and u_curves.png, and print the table."""
    from megatron_tst.telemetry.plots import draw_u_curves

    losses = losses_by_point(results)
    table_file, picture = output / "sweep.csv", output / PICTURE
    with writing_output(table_file, "--output"), table_file.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("bag_weights", "step_ratio", "bag_size", "seed", "data_tokens", "gpu_hours", "final_loss"))
        for result in results:
            point = result.point
            setting = (point.bag_weights, point.step_ratio, point.bag_size, result.seed)
            writer.writerow((*setting, result.data_tokens, f"{result.gpu_hours:.4g}", f"{result.final_loss:.4f}"))
    table = Table("bag weights", "r", "s", "final loss, nats per token", "less baseline")
    baseline = next((loss.value for point, loss in losses.items() if point.bag_size == 1), None)
    best = min(losses, key=lambda point: losses[point].value)
    for point, loss in losses.items():
        gap = "" if baseline is None or point.bag_size == 1 else f"{loss.value - baseline:+.4f}"
        setting = (point.bag_weights, f"{point.step_ratio:g}", str(point.bag_size))
        table.add_row(*setting, loss.write(4), gap, style="bold" if point == best else None)
    console = Console()
    console.print(table)
    curves = {(p.bag_weights, p.step_ratio, p.bag_size): loss for p, loss in losses.items()}
    with writing_output(picture, "--output"):
        draw_u_curves(curves, picture)
    console.print(f"results: {table_file}  picture: {picture}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        sys.exit(main(*parse_arguments()))
    except KeyboardInterrupt:
        print("sweep.py: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
