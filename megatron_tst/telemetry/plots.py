"""Pictures of runs; needs the ``plot`` extra (matplotlib)."""

from pathlib import Path

import matplotlib.figure

from megatron_tst.telemetry.compare import RunCurve

# Okabe and Ito's palette, told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_loss_curves(curves: list[RunCurve], path: Path) -> None:
    """Draw next-token validation loss against steps, each change of the bag size marked.

    Args:
        curves: the runs.
        path: PNG or SVG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for curve, colour in zip(curves, COLOURS, strict=False):
        bags = ", then ".join(f"s = {size}" for size in curve.bag_sizes)
        steps, losses = zip(*curve.valid, strict=True)
        axes.plot(steps, losses, color=colour, marker="o", markersize=3, label=f"{curve.name} ({bags})")
        for switch in curve.switches:
            axes.axvline(switch, color=colour, linestyle=":", linewidth=1.2)
            axes.annotate(
                "switch", (switch, 0.97), xycoords=("data", "axes fraction"), xytext=(4, 0),
                textcoords="offset points", va="top", color=colour,
            )  # fmt: skip
    finals = sorted(curve.final_loss for curve in curves)
    early = sorted(loss for curve in curves for _, loss in curve.valid)
    # The first evaluations of a run are several nats above the rest and would flatten all differences.
    axes.set_ylim(finals[0] - 0.05 * (early[-1] - finals[0]), early[int(0.9 * (len(early) - 1))])
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("next-token validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path)
