#!/usr/bin/env python3
"""Draw the peak memory of output layer and loss against bag size and vocabulary, with a line for each implementation.

    OMP_NUM_THREADS=1 python benchmarks/loss_memory.py --picture docs/images/loss_memory.png

``benchmarks/loss.py --hidden`` measures each point as a forward and backward pass in a separate process: the peak of
resident memory above the weight, the hidden states and the weight's gradient, on the CPU in float32. The ``plot`` extra
is required.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

# Okabe and Ito's palette, which colour-blind readers can distinguish.
LINES = {
    "loop": ("loop over targets", "#D55E00", "^"),
    "megatron-core, 1 target": ("megatron-core, 1 target", "#009E73", "s"),
    "native": ("native", "#0072B2", "o"),
    "linear": ("linear", "#CC79A7", "D"),
}
BAG_SIZES, VOCABULARIES = (1, 2, 4, 8, 16), (4096, 8192, 16384, 32768)
VOCABULARY, BAG_SIZE = 8192, 4  # fixed in the panel of bag sizes and in that of vocabularies


def measure_mib(name: str, rows: int, vocab: int, bag_size: int) -> float:
    """Return the peak of one pass in MiB."""
    script = Path(__file__).with_name("loss.py")
    command = [sys.executable, str(script), "--hidden", "64", "--variants", name, "--memory-of", name]
    done = subprocess.run([*command, str(rows), str(vocab), str(bag_size)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 2**20


def draw(panels: list[tuple[str, tuple[int, ...], dict[str, list[float]]]], path: Path) -> None:
    """Draw the lines of each panel on logarithmic axes."""
    # The letters are as large as the text of a page on which the picture is 800 pixels wide.
    with matplotlib.rc_context({"font.size": 12.0, "savefig.dpi": 200}):
        figure = matplotlib.figure.Figure(figsize=(8.0, 4.2), layout="constrained")
        plots = figure.subplots(1, len(panels), sharey=True)
        for plot, (label, places, lines) in zip(plots, panels, strict=True):
            for name, values in lines.items():
                text, colour, marker = LINES[name]
                plot.plot(places, values, color=colour, marker=marker, label=text)
            plot.set_xscale("log", base=2)
            plot.set_yscale("log")
            plot.set_xticks(places, [str(place) for place in places])
            plot.set_xlabel(label)
            plot.grid(alpha=0.3)
        plots[0].yaxis.set_major_formatter(ScalarFormatter())
        plots[0].yaxis.set_minor_formatter(NullFormatter())
        plots[0].set_ylabel("peak memory, MiB")
        figure.legend(*plots[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        figure.savefig(path)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--picture", type=Path, required=True)
    arguments = parser.parse_args()
    by_bag_size, by_vocabulary = (
        {name: [measure_mib(name, arguments.rows, *size) for size in sizes] for name in LINES}
        for sizes in ([(VOCABULARY, s) for s in BAG_SIZES], [(v, BAG_SIZE) for v in VOCABULARIES])
    )
    for name in LINES:
        print(name, [round(mib) for mib in by_bag_size[name]], [round(mib) for mib in by_vocabulary[name]])
    panels = [
        (f"bag size (V = {VOCABULARY})", BAG_SIZES, by_bag_size),
        (f"vocabulary (S = {BAG_SIZE})", VOCABULARIES, by_vocabulary),
    ]
    draw(panels, arguments.picture)


if __name__ == "__main__":
    main()
