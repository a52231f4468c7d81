"""Pictures of runs; needs the ``plot`` extra (matplotlib)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure

from megatron_tst.telemetry.compare import RunCurve

# Okabe and Ito's palette, told apart by colour-blind readers.
LINES = ("-", "--", "-.")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


AXES = {"steps": "optimizer steps", "data_tokens": "data tokens read", "hours": "hours of training"}


def draw_loss_curves(curves: list[RunCurve], path: Path, axes: Sequence[str] = ("steps",)) -> None:
    """Draw next-token validation loss, each change of the bag size marked.

    Args:
        curves: the runs.
        path: PNG or SVG to write.
        axes: what to draw the loss against, a panel each; of :data:`AXES`.
    """
    figure = matplotlib.figure.Figure(
        figsize=(8 if len(axes) == 1 else 5 * len(axes), 4.5), dpi=150, layout="constrained"
    )
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        for number, curve in enumerate(curves):
            _draw(panel, curve, axis, number)
        panel.set_xlabel(AXES[axis])
        panel.grid(alpha=0.3)
    finals = sorted(curve.final_loss for curve in curves)
    early = sorted(loss for curve in curves for _, loss in curve.valid)
    # The first evaluations of a run are several nats above the rest and would flatten all differences.
    panels[0].set_ylim(finals[0] - 0.05 * (early[-1] - finals[0]), early[int(0.9 * (len(early) - 1))])
    panels[0].set_ylabel("next-token validation loss (nats per token)")
    panels[0].legend(loc="upper right")
    figure.savefig(path)


def _draw(panel: Any, curve: RunCurve, axis: str, number: int) -> None:
    colour, line = COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]
    bags = ", then ".join(f"s = {size}" for size in curve.bag_sizes)
    steps, losses = zip(*curve.valid, strict=True)
    places = steps if axis == "steps" else curve.axes[axis]
    panel.plot(places, losses, line, color=colour, marker="o", markersize=3, label=f"{curve.name} ({bags})")
    for switch in curve.switches if axis == "steps" else ():
        panel.axvline(switch, color=colour, linestyle=":", linewidth=1.2)
        panel.annotate(
            "switch", (switch, 0.97 - 0.06 * number), xycoords=("data", "axes fraction"), xytext=(4, 0),
            textcoords="offset points", va="top", color=colour,
        )  # fmt: skip
