"""Pictures of runs; needs the ``plot`` extra (matplotlib)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.ticker

from megatron_tst.telemetry.compare import Estimate, Group, Method
from megatron_tst.telemetry.progress import short

# Okabe and Ito's palette, told apart by colour-blind readers.
LINES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
AXES = {
    "steps": "optimizer steps (dotted: switch)",
    "data_tokens": "data tokens read",
    "flops": "training FLOPs",
    "gpu_hours": "GPU-hours of training",
}
LOSS = "next-token validation loss (nats per token)"


def draw_comparison(methods: Sequence[Method], path: Path, axes: Sequence[str]) -> None:
    """Draw the runs' validation loss, each change of the bag size marked, and where runs of several lengths end.

    Args:
        methods: the runs.
        path: PNG or SVG to write.
        axes: what to draw the loss against, a panel each; of :data:`AXES`.
    """
    groups = [group for method in methods for group in method.groups]
    with_ends = len(groups) > len(methods)
    panels = len(axes) + with_ends
    figure = matplotlib.figure.Figure(figsize=(max(7.0, 0.5 + 3.4 * panels), 4.2), dpi=150, layout="constrained")
    plots = figure.subplots(1, panels, squeeze=False)[0]
    for plot, axis in zip(plots, axes, strict=False):
        for number, method in enumerate(methods):
            for length, group in enumerate(method.groups):
                _draw_curves(plot, group, axis, _style(number, length))
        _limit(plot, groups)
        plot.set_xlabel(AXES[axis])
        if axis == "data_tokens":
            plot.xaxis.set_major_formatter(lambda number, _: short(number))
        if plot is not plots[0]:
            plot.tick_params(labelleft=False)
    if with_ends:
        _draw_ends(plots[-1], methods)
    for plot in plots:
        plot.grid(alpha=0.3)
    plots[0].set_ylabel(LOSS)
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=max(1, min(len(labels), panels)),
        frameon=False,
        handlelength=4,
    )
    figure.savefig(path)


def _style(number: int, length: int = 0) -> dict[str, Any]:
    """Return a method's colour, and a line for each of its lengths; another marker where these come round again."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[length % len(LINES)],
        "marker": MARKERS[(number // len(COLOURS) + length // len(LINES)) % len(MARKERS)],
    }


def _draw_curves(plot: Any, group: Group, axis: str, style: dict[str, Any]) -> None:
    """Draw a group's runs, one line per seed."""
    bags = ", then ".join(f"s = {size}" for size in group.runs[0].bag_sizes)
    seeds = f", {len(group.runs)} seeds" if len(group.runs) > 1 else ""
    for run in group.runs:
        label = f"{group.name} ({bags}{seeds})" if run is group.runs[0] else None
        plot.plot(run.axes[axis], run.losses, markersize=3, linewidth=1.2, label=label, **style)
    for switch in group.runs[0].switches if axis == "steps" else ():
        plot.axvline(switch, color=style["color"], linestyle=":", linewidth=1.2)


def _limit(plot: Any, groups: Sequence[Group]) -> None:
    """Leave out the first evaluations, several nats above the rest: they would flatten all differences."""
    runs = [run for group in groups for run in group.runs]
    finals = [run.final_loss for run in runs]
    losses = sorted(loss for run in runs for loss in run.losses if math.isfinite(loss))
    lowest, highest = min(finals), max(*finals, losses[int(0.9 * (len(losses) - 1))])
    margin = 0.05 * (highest - lowest) or 0.01
    plot.set_ylim(lowest - margin, highest + margin)


def _draw_ends(plot: Any, methods: Sequence[Method]) -> None:
    """Draw final losses over FLOPs, a line per method, bars for the standard error over seeds."""
    for number, method in enumerate(methods):
        flops = [group.total("flops") for group in method.groups]
        losses = [group.final_loss for group in method.groups]
        _draw_estimates(plot, flops, losses, label=method.name, **_style(number))
    plot.set_xscale("log")
    ends = sorted({flops for method in methods for flops, _ in method.ends()})
    plot.set_xticks(ends, [f"{flops:.3g}" for flops in ends], rotation=45, ha="right", fontsize="small")
    plot.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    plot.set_xlabel(AXES["flops"])
    plot.set_ylabel("final validation loss (nats per token)")
    plot.set_title("± standard error over seeds", fontsize="medium")
    plot.legend(loc="upper right")


def _draw_estimates(plot: Any, places: Sequence[float], losses: Sequence[Estimate], **style: Any) -> None:
    """Draw losses as a line, with bars for the errors that are known."""
    errors = [loss.error or 0.0 for loss in losses]
    values = [loss.value for loss in losses]
    plot.errorbar(places, values, errors if any(errors) else None, markersize=4, capsize=3, **style)


def draw_u_curves(losses: Mapping[tuple[str, float, int], Estimate], path: Path) -> None:
    """Draw final loss over bag size, a line per step ratio and a panel per bag weights.

    Args:
        losses: by bag weights, step ratio and bag size; bag size 1 is the baseline.
        path: PNG or SVG to write.
    """
    kinds = sorted({weights for weights, _, size in losses if size > 1}) or ["uniform"]
    ratios = sorted({ratio for _, ratio, size in losses if size > 1})
    figure = matplotlib.figure.Figure(figsize=(max(6.0, 5.0 * len(kinds)), 4.5), dpi=150, layout="constrained")
    plots = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    baseline = next((loss for (_, _, size), loss in losses.items() if size == 1), None)
    for plot, weights in zip(plots, kinds, strict=True):
        for number, ratio in enumerate(ratios):
            chosen = {
                size: loss for (kind, r, size), loss in losses.items() if (kind, r) == (weights, ratio) and size > 1
            }
            line = sorted(chosen)
            _draw_estimates(
                plot, line, [chosen[size] for size in line], label=f"step ratio r = {ratio:g}", **_style(number)
            )
        if baseline:
            plot.axhline(baseline.value, color="black", linestyle="--", linewidth=1.2, label="baseline (s = 1)")
        plot.set_title(f"{weights.replace('_', ' ')} bag weights", fontsize="medium")
        plot.set_xlabel("bag size s (data tokens per position)")
        plot.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        plot.grid(alpha=0.3)
    plots[0].set_ylabel("final next-token validation loss\n(nats per token, ± standard error over seeds)")
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), frameon=False)
    figure.savefig(path)
