#!/usr/bin/env python3
r"""Train a grid of runs on one machine: bag size s, step ratio r, bag weights, lengths and any other setting.

    python tools/sweep.py --output runs/sweep --bag-sizes 2 4 8 --step-ratios 0.2 0.3 --seeds 1 2 3 --workers 2 \
        --config examples/quickstart/config.yaml [flags of pretrain_tst.py]
    ... --bag-sizes 4 --step-ratios 0.3 --vary tst-objective mce mce_alt --vary lr 2e-3 4e-3 --steps 2250 4500
    ... --phases 8:0.1,4:0.1,2:0.1 4:0.3                lists of phases instead of bag sizes and step ratios
    python tools/sweep.py --output runs/sweep --draw runs/270m-s*           existing runs, for example from a cluster

Every combination is trained, and a baseline for each combination of the settings that do not concern superposition. If
the sweep is stopped, the same command continues it. Results: sweep.csv with one line per run, sweep_means.csv with one
line per setting, and a plot.
"""

import argparse
import csv
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_tst.analysis.compare import Estimate
from megatron_tst.analysis.runner import NOT_STARTED, Runner
from megatron_tst.analysis.sweep import Grid, SweepRun, grid_phases, plan_sweep, read_phases
from megatron_tst.analysis.sweep_results import (
    BAG_WEIGHTS,
    SweepResult,
    SweepSetting,
    final_loss_curves,
    gather,
    heading,
    read_result,
)
from megatron_tst.config import EXIT_CODE, UserError
from megatron_tst.config.locks import locked
from megatron_tst.distributed.device import visible_gpus
from megatron_tst.telemetry.outputs import check_picture, writing_output

CAPTION = (
    "Final loss: next-token validation loss in nats per token, with its standard error over seeds. Less baseline: "
    "mean over seeds of the final loss minus the final loss of the baseline with the same seed."
)
PROGRAM = Path(__file__).parents[1] / "pretrain_tst.py"


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read this program's flags; all other flags are those of pretrain_tst.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--results", type=Path, help="folder of the tables and the plot (default: --output)")
    parser.add_argument("--bag-sizes", type=int, nargs="+", default=[2, 4, 6, 8], metavar="S")
    parser.add_argument("--step-ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4], metavar="R")
    parser.add_argument("--phases", nargs="+", metavar="S:R,S:R", help="bag sizes with their fractions of the steps")
    parser.add_argument("--bag-weights", nargs="+", default=["uniform"], metavar="NAME")
    parser.add_argument(
        "--vary", nargs="+", action="append", default=[], metavar="NAME VALUE",
        help="setting of pretrain_tst.py and its values; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[], metavar="N", help="run lengths; warm-up and decay scale along"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--workers", type=int, help="concurrent runs (default: one per GPU, 1 on a CPU)")
    parser.add_argument("--plan", action="store_true", help="only list the runs and whether they have finished")
    parser.add_argument(
        "--draw", type=Path, nargs="+", metavar="RUN", help="train nothing; evaluate these run directories"
    )
    return parser.parse_known_args()


def main(arguments: argparse.Namespace, flags: list[str]) -> int:
    """Train the missing runs, then show all results; return the exit code."""
    results = arguments.results or arguments.output
    if arguments.draw:
        if flags:
            raise UserError(f"{flags[0]}: has no effect with --draw, which trains nothing")
        make_folders(arguments.output, results)
        with locked(arguments.output / "sweep", f"--output {arguments.output}"):
            show([read_result(path) for path in arguments.draw], results)
        return 0
    runs = plan_sweep(read_grid(arguments), arguments.output, flags)
    if arguments.plan:
        missing = {run.name for run in runs if not run.is_complete}
        for run in runs:
            print(f"{run.name}: {'to train' if run.name in missing else 'finished'}")
        print(f"{len(runs)} runs, {len(missing)} of them to train")
        return 0
    gpus = visible_gpus()
    workers = max(len(gpus), 1) if arguments.workers is None else arguments.workers
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    make_folders(arguments.output, results)
    with locked(arguments.output / "sweep", f"--output {arguments.output}"):
        return train_and_show(runs, Runner(PROGRAM, workers, gpus), results)


def read_grid(arguments: argparse.Namespace) -> Grid:
    """Read the grid from this program's flags."""
    phases = grid_phases(arguments.bag_sizes, arguments.step_ratios)
    if arguments.phases:
        phases = [read_phases(text) for text in arguments.phases]
    settings: dict[str, list[str]] = {}
    for name, *values in arguments.vary:
        key = name.removeprefix("--").replace("-", "_")
        if not values or key in settings:
            raise UserError(f"--vary {name}: " + ("is given twice" if values else "needs at least one value"))
        settings[key] = values
    return Grid(phases, arguments.bag_weights, settings, arguments.steps, arguments.seeds)


def train_and_show(runs: Sequence[SweepRun], runner: Runner, results: Path) -> int:
    """Train the missing runs, then show all finished runs, even after an interruption; return the exit code."""
    missing = [run for run in runs if not run.is_complete]
    print(f"{len(runs)} runs, {len(missing)} of them to train, {runner.workers} at a time", flush=True)
    try:
        is_done = train(missing, runner)
    finally:
        ended = [read_result(run.directory.path) for run in runs if run.is_complete]
        if ended:
            show(ended, results)
    return 0 if is_done else 1


def make_folders(output: Path, results: Path) -> None:
    """Create the folders of the runs and the results, and check that files and plots can be written there."""
    check_picture(output / "picture.png", "--output")
    check_picture(results / "picture.png", "--results")


def train(runs: Sequence[SweepRun], runner: Runner) -> bool:
    """Train the runs and report how each ends; return whether all of them finished."""
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
            told = f"did not finish: {failure}"
            if failure is None:
                try:
                    told = f"final loss {read_result(run.directory.path).curve.final_loss:.4f}"
                    num_ended += 1
                except UserError as error:
                    told = f"did not finish: {error}"
            console.print(f"{run.name}: {told}", highlight=False, soft_wrap=True)
    if num_waiting:
        console.print(f"{num_waiting} other runs were not started")
    return num_ended == len(runs)


def show(results: Sequence[SweepResult], folder: Path) -> None:
    """Write the tables and the plot, and print the means."""
    from megatron_tst.analysis.plots import draw_final_losses, draw_settings

    settings = gather(results)
    with writing_output(folder, "--results"):
        write_csv(folder / "sweep.csv", run_rows(settings))
        write_csv(folder / "sweep_means.csv", mean_rows(settings))
    console = Console()
    console.print(means_table(settings))
    console.print(CAPTION, highlight=False, soft_wrap=True)
    baselines = [setting.final_loss for setting in settings if not setting.phases]
    baseline = baselines[0] if len(baselines) == 1 else None
    curves = final_loss_curves(settings)
    picture = folder / (curves.file if curves else "settings.png")
    with writing_output(picture, "--results"):
        if curves:
            draw_final_losses(curves.panels, baseline and (curves.baseline_at, baseline), curves.axis, picture)
        else:
            draw_settings([(s.label, s.losses, s.less_baseline) for s in settings], baseline, picture)
    told = f"results: {folder / 'sweep.csv'}, {folder / 'sweep_means.csv'}  plot: {picture}"
    console.print(told, highlight=False, soft_wrap=True)


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows to a CSV file; the first row holds the names of the columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def setting_columns(setting: SweepSetting) -> dict[str, object]:
    """Return the values that identify a setting, by column; several phases are separated by spaces."""
    phases = setting.phases or ((1, 0.0),)
    return {
        "bag_weights": setting.bag_weights,
        "step_ratio": " ".join(str(share) for _, share in phases),
        "bag_size": " ".join(str(size) for size, _ in phases),
        **{heading(flag): value for flag, value in setting.varied.items() if flag != BAG_WEIGHTS},
    }


def run_rows(settings: Sequence[SweepSetting]) -> Iterator[Sequence[object]]:
    """Yield one line per run, after the header."""
    ends = ("seed", "data_tokens", "gpu_hours", "final_loss", "less_baseline", "run")
    yield (*setting_columns(settings[0]), *ends)
    for setting in settings:
        gaps = setting.differences()
        for seed, run in setting.runs.items():
            gap = f"{gaps[seed]:.4f}" if seed in gaps else ""
            costs = int(run.curve.total("data_tokens")), f"{run.curve.total('gpu_hours'):.4g}"
            yield (*setting_columns(setting).values(), seed, *costs, f"{run.curve.final_loss:.4f}", gap, run.name)


def mean_rows(settings: Sequence[SweepSetting]) -> Iterator[Sequence[object]]:
    """Yield one line per setting, after the header: means and their standard errors, which need several seeds."""
    ends = ("seeds", "final_loss", "final_loss_error", "pairs", "less_baseline", "less_baseline_error")
    yield (*setting_columns(settings[0]), *ends)
    for setting in settings:
        loss, gap = (written(estimate) for estimate in (setting.final_loss, setting.less_baseline))
        pairs = len(setting.differences())
        yield (*setting_columns(setting).values(), len(setting.runs), *loss, pairs, *gap)


def written(estimate: Estimate | None) -> tuple[str, str]:
    """Format a mean and its standard error; unknown values are empty."""
    if estimate is None:
        return "", ""
    return f"{estimate.value:.4f}", "" if estimate.error is None else f"{estimate.error:.4f}"


def means_table(settings: Sequence[SweepSetting]) -> Table:
    """Return the means as a table, with the lowest loss in bold."""
    columns = [name.replace("_", " ") for name in setting_columns(settings[0])]
    shown = [n for n, name in enumerate(columns) if name != "bag weights" or BAG_WEIGHTS in settings[0].varied]
    names = {"step ratio": "r", "bag size": "s"}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for n in shown:
        table.add_column(names.get(columns[n], columns[n]), overflow="fold")
    for name in ("seeds", "final loss", "less baseline"):
        # A header may wrap to two lines, but a number must not.
        table.add_column(name, justify="right", no_wrap=name != "seeds")
    best = min(settings, key=lambda setting: setting.final_loss.value)
    for setting in settings:
        values = list(setting_columns(setting).values())
        gap = setting.less_baseline
        pairs = len(setting.differences())
        told = "" if gap is None else gap.signed(4) + (f" ({pairs} pairs)" if pairs < len(setting.runs) else "")
        row = [*("" if values[n] is None else str(values[n]) for n in shown), str(len(setting.runs))]
        table.add_row(*row, setting.final_loss.write(4), told, style="bold" if setting is best else None)
    return table


if __name__ == "__main__":
    # SIGTERM makes the sweep ask its runs to save and stop, just like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(*parse_arguments()))
    except KeyboardInterrupt:
        print("sweep.py: stopped; the same command continues the sweep", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
