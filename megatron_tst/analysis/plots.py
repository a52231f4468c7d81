"""Plots of runs; needs the ``plot`` extra (matplotlib).

The font size matches the text of a web page that shows a plot 800 pixels wide, such as a README.
"""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import matplotlib.figure
import numpy

from megatron_tst.analysis.compare import Estimate, Group, Method
from megatron_tst.analysis.curves import RunCurve
from megatron_tst.telemetry.progress import short

# The palette of Okabe and Ito, which color-blind readers can distinguish.
LINES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
AXES = {
    "steps": "optimizer steps (dotted: switch)",
    "data_tokens": "data tokens read",
    "flops": "training FLOPs",
    "gpu_hours": "GPU-hours of training",
}
LOSS = "next-token validation loss\n(nats per token)"
FINAL_LOSS = "final next-token validation loss\n(nats per token)"
# 12 points on 8 inches correspond to 16.7 pixels on 800 pixels.
_WIDTH_INCHES = 8.0
_STYLE = {"font.size": 12.0, "axes.titlesize": 12.0, "legend.fontsize": 12.0, "savefig.dpi": 200}


def draw_comparison(methods: Sequence[Method], path: Path, axes: Sequence[str]) -> None:
    """Draw the validation loss of runs over each axis and, if there are several lengths, the final losses over FLOPs.

    The mean over seeds has a band of its standard error. A horizontal line marks the final loss of the first method's
    longest runs, the baseline.

    Args:
        methods: methods to draw, the baseline first.
        path: PNG or SVG file to write.
        axes: horizontal axes, one panel each, from :data:`AXES`.
    """
    groups = [group for method in methods for group in method.groups]
    with_ends = len(groups) > len(methods)
    with matplotlib.rc_context(_STYLE):
        figure, plots, spare = _panels(len(axes) + with_ends, len(groups))
        for plot, axis in zip(plots, axes, strict=False):
            for number, method in enumerate(methods):
                for length, group in enumerate(method.groups):
                    _draw_curves(plot, group, axis, line_style(number, length))
            _mark_across(plot, methods[0].groups[-1].final_loss, f"end of {methods[0].groups[-1].name}")
            set_loss_limits(plot, groups)
            _from_nothing(plot, axis, max(run.total(axis) for group in groups for run in group.runs))
        if with_ends:
            _draw_ends(plots[-1], methods)
        for plot in plots:
            plot.grid(alpha=0.3)
            if plot.get_subplotspec().is_first_col():
                plot.set_ylabel(LOSS)
        _place_legend(figure, plots[0], spare)
        figure.savefig(path)


def _panels(count: int, num_labels: int) -> tuple[matplotlib.figure.Figure, list[Any], Any | None]:
    """Return a figure of one or two columns, its used panels, and the unused panel if there is one."""
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    spare = columns * rows - count
    # Without an unused panel, the legend is above the panels.
    height = (3.3 * rows if rows > 1 else 4.2) + (0.0 if spare else 0.25 * math.ceil((num_labels + 1) / 2))
    figure = matplotlib.figure.Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    plots = list(figure.subplots(rows, columns, squeeze=False).flat)
    return figure, plots[:count], plots[count] if spare else None


def _place_legend(figure: matplotlib.figure.Figure, labelled: Any, spare: Any | None) -> None:
    """Put the legend into the unused panel, or above all panels."""
    handles, labels = labelled.get_legend_handles_labels()
    style = {"frameon": False, "handlelength": 2.5}
    if spare is not None:
        spare.set_axis_off()
        spare.legend(handles, [fill(label, 36) for label in labels], loc="center", **style)
    else:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 2), **style)


def line_style(number: int, length: int = 0) -> dict[str, Any]:
    """Return the color of a method, the line style of a length, and another marker if these repeat."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[length % len(LINES)],
        "marker": MARKERS[(number // len(COLOURS) + length // len(LINES)) % len(MARKERS)],
    }


def _draw_curves(plot: Any, group: Group, axis: str, style: dict[str, Any]) -> None:
    """Draw the mean of a group with a band of its standard error, and its runs as thin lines."""
    bags = ", then ".join(f"s = {size}" for size in group.runs[0].bag_sizes)
    label = f"{group.name} ({bags}{f'; {len(group.runs)} seeds' if len(group.runs) > 1 else ''})"
    # Runs that were evaluated at different steps have no mean.
    has_mean = len({tuple(run.axes["steps"]) for run in group.runs}) == 1
    if has_mean:
        places = numpy.mean([run.axes[axis] for run in group.runs], axis=0)
        with numpy.errstate(invalid="ignore"):
            losses = numpy.array([run.losses for run in group.runs])
            mean = losses.mean(axis=0)
            error = losses.std(axis=0, ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else numpy.zeros_like(mean)
        plot.plot(places, mean, markersize=4, linewidth=1.8, label=label, **style)
        plot.fill_between(places, mean - error, mean + error, color=style["color"], alpha=0.25, linewidth=0)
    for number, run in enumerate(group.runs if not has_mean or len(group.runs) > 1 else ()):
        thin = {**style, "marker": None}
        first = label if number == 0 and not has_mean else None
        plot.plot(run.axes[axis], run.losses, linewidth=0.7, alpha=0.5 if has_mean else 1.0, label=first, **thin)
    for switch in group.runs[0].switches if axis == "steps" else ():
        plot.axvline(switch, color=style["color"], linestyle=":", linewidth=1.4)


def _mark_across(plot: Any, loss: Estimate, label: str, is_vertical: bool = False) -> None:
    """Draw a loss as a line across the whole panel, with a band of its standard error."""
    line, band = (plot.axvline, plot.axvspan) if is_vertical else (plot.axhline, plot.axhspan)
    line(loss.value, color="black", linestyle="--", linewidth=1.2, label=label, zorder=1)
    if loss.error:
        band(loss.value - loss.error, loss.value + loss.error, color="black", alpha=0.12, linewidth=0, zorder=0)


def set_loss_limits(plot: Any, groups: Sequence[Group]) -> None:
    """Limit the loss axis so that high losses of phases with bags and of the first steps do not flatten the rest."""
    runs = [run for group in groups for run in group.runs]
    finals = [run.final_loss for run in runs]
    losses = sorted(loss for run in runs for loss in _ordinary_losses(run))
    lowest, highest = min(finals), max(*finals, losses[int(0.9 * (len(losses) - 1))])
    margin = 0.05 * (highest - lowest) or 0.01
    plot.set_ylim(lowest - margin, highest + margin)


def _ordinary_losses(run: RunCurve) -> list[float]:
    """Return the losses of the evaluations in phases of bag size 1, and of the last evaluation."""
    phases = [bisect.bisect_left(run.switches, step) for step in run.axes["steps"]]
    found = [loss for loss, phase in zip(run.losses, phases, strict=True) if run.bag_sizes[phase] == 1]
    return [loss for loss in (*found, run.final_loss) if math.isfinite(loss)]


def _from_nothing(plot: Any, axis: str, most: float) -> None:
    """Start an axis at zero and end it slightly beyond the longest run."""
    plot.set_xlim(0, 1.03 * most)
    plot.set_xlabel(AXES[axis])
    plot.locator_params(axis="x", nbins=3 if axis == "flops" else 5)
    if axis == "data_tokens":
        plot.xaxis.set_major_formatter(lambda number, _: short(number))
    elif axis == "flops":
        plot.xaxis.set_major_formatter(lambda number, _: f"{number:.3g}")


def _draw_ends(plot: Any, methods: Sequence[Method]) -> None:
    """Draw final losses over FLOPs, with one line per method and error bars over seeds."""
    for number, method in enumerate(methods):
        flops = [group.total("flops") for group in method.groups]
        losses = [group.final_loss for group in method.groups]
        _draw_estimates(plot, flops, losses, label=method.name, **line_style(number))
    _from_nothing(plot, "flops", max(flops for method in methods for flops, _ in method.ends()))
    plot.set_title("final losses ± standard error")
    plot.legend(loc="best")


def _draw_estimates(plot: Any, places: Sequence[float], losses: Sequence[Estimate], **style: Any) -> None:
    """Draw losses as a line, with error bars where errors are known."""
    errors = [loss.error or 0.0 for loss in losses]
    values = [loss.value for loss in losses]
    plot.errorbar(places, values, errors if any(errors) else None, markersize=5, capsize=4, linewidth=1.8, **style)


def draw_final_losses(
    panels: Mapping[str, Mapping[str, Mapping[float, Estimate]]],
    baseline: tuple[float, Estimate] | None,
    axis: str,
    path: Path,
) -> None:
    """Draw final loss over a setting, such as bag size, with error bars over seeds and a line for the baseline.

    Args:
        panels: final losses by panel title, line label and value of the setting.
        baseline: value of the setting that means no bags, with the final loss of the baseline.
        axis: label of the setting's axis.
        path: PNG or SVG file to write.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    values = sorted({value for lines in panels.values() for line in lines.values() for value in line})
    ticks = values if baseline is None else [baseline[0], *values]
    # Points of one value are drawn side by side, so their error bars do not overlap.
    apart = 0.06 * min((b - a for a, b in itertools.pairwise(values)), default=1.0)
    with matplotlib.rc_context(_STYLE):
        figure, plots, spare = _panels(len(panels), len(labels))
        for plot, (title, lines) in zip(plots, panels.items(), strict=True):
            for label, line in lines.items():
                number = labels.index(label)
                shift = apart * (number - (len(labels) - 1) / 2)
                places = sorted(line)
                shifted = [place + shift for place in places]
                _draw_estimates(plot, shifted, [line[place] for place in places], label=label, **line_style(number))
            if baseline:
                place, loss = baseline
                _mark_across(plot, loss, "baseline")
                _draw_estimates(plot, [place], [loss], color="black", marker="o")
            plot.set_title(title)
            plot.set_xlabel(axis)
            plot.set_xticks(ticks, [f"{value:g}" for value in ticks])
            plot.grid(alpha=0.3)
            if plot.get_subplotspec().is_first_col():
                plot.set_ylabel(f"{FINAL_LOSS}, ± standard error")
            else:
                plot.sharey(plots[0])
        _place_legend(figure, plots[0], spare)
        figure.savefig(path)


def draw_settings(
    rows: Sequence[tuple[str, Sequence[float], Estimate | None]], baseline: Estimate | None, path: Path
) -> None:
    """Draw final losses with one row per setting: its seeds, their mean with its standard error, and the baseline.

    Args:
        rows: rows from the top: label of the setting, final loss of each seed, and mean difference from the baseline
            of the same seed, if it is known; all in nats per token.
        baseline: final loss without bags.
        path: PNG or SVG file to write.
    """
    labels = [fill(label, 24) for label, _, _ in rows]
    # The height of a row depends on the number of lines of its label.
    heights = [0.28 + 0.22 * (label.count("\n") + 1) for label in labels]
    places = [sum(heights[:number]) + height / 2 for number, height in enumerate(heights)]
    with matplotlib.rc_context(_STYLE):
        figure = matplotlib.figure.Figure(figsize=(_WIDTH_INCHES, 1.4 + sum(heights)), layout="constrained")
        plot = figure.subplots()
        for place, (_, losses, _) in zip(places, rows, strict=True):
            mean = Estimate.of(losses)
            plot.plot(losses, [place] * len(losses), "o", color="grey", markersize=4, alpha=0.7)
            plot.errorbar(
                mean.value, place, xerr=mean.error, marker="D", markersize=6, capsize=5, linewidth=2, color=COLOURS[0]
            )
        if baseline:
            _mark_across(plot, baseline, "baseline", is_vertical=True)
        plot.set_yticks(places, labels)
        plot.set_ylim(sum(heights), 0)
        plot.set_xlabel(f"{FINAL_LOSS.replace(chr(10), ' ')}\ndots: seeds; diamond: mean ± standard error")
        _write_beside(plot, places, [gap for _, _, gap in rows])
        plot.grid(alpha=0.3)
        figure.savefig(path)


def _write_beside(plot: Any, places: Sequence[float], gaps: Sequence[Estimate | None]) -> None:
    """Write each row's difference from the baseline at the right edge."""
    beside = plot.twinx()
    beside.set_ylim(plot.get_ylim())
    beside.set_yticks(places, ["" if gap is None else gap.signed(4) for gap in gaps])
    beside.tick_params(axis="y", length=0)
    if any(gaps):
        beside.set_title("less baseline", loc="right")
