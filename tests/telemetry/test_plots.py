"""What pictures show: no end of a run lies outside."""

import math
from pathlib import Path

import matplotlib.figure
import pytest

from megatron_tst.telemetry import plots
from megatron_tst.telemetry.compare import Estimate, find_methods
from megatron_tst.telemetry.curves import read_curve
from tests.telemetry.finished import write_run

CURVES = {
    "one evaluation each": ([2.6], [2.5]),
    "equal": ([2.5], [2.5]),
    "a high end": ([9.0, 3.0, 2.9], [9.0, 8.0, 7.0]),
    "an evaluation that is no number": ([math.nan, 3.0, 2.9], [9.0, math.inf, 2.5]),
    "a high start": ([9.0, *[2.9] * 20, 2.5], [9.5, *[2.9] * 20, 2.4]),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_ends_of_all_runs_are_seen(tmp_path: Path, name, monkeypatch):
    drawn = []
    limit = plots._limit
    monkeypatch.setattr(plots, "_limit", lambda plot, groups: (limit(plot, groups), drawn.append(plot.get_ylim())))
    for number, losses in enumerate(CURVES[name]):
        write_run(tmp_path / str(number), losses, seed=number)
    methods = find_methods(read_curve(tmp_path / str(number)) for number in (0, 1))
    plots.draw_comparison(methods, tmp_path / "c.png", ["steps", "data_tokens"])
    assert len(drawn) == 2
    for low, high in drawn:
        assert all(low < losses[-1] < high for losses in CURVES[name])
        if name == "a high start":
            assert high < 9.0


def test_a_line_per_ratio_and_a_panel_per_weights(tmp_path: Path, monkeypatch):
    figures = []
    make = matplotlib.figure.Figure
    monkeypatch.setattr(matplotlib.figure, "Figure", lambda **named: figures.append(make(**named)) or figures[-1])
    losses = {("uniform", 0.0, 1): Estimate(3.0, 0.1)}
    losses |= {(w, r, s): Estimate(2.9, None) for w in ("uniform", "power_law") for r in (0.2, 0.4) for s in (2, 4)}
    plots.draw_u_curves(losses, tmp_path / "u.svg")
    assert [plot.get_title() for plot in figures[0].axes] == ["power law bag weights", "uniform bag weights"]
    labels = figures[0].axes[0].get_legend_handles_labels()[1]
    assert sorted(labels) == ["baseline (s = 1)", "step ratio r = 0.2", "step ratio r = 0.4"]


def test_a_grid_whose_baseline_alone_has_ended_is_drawn(tmp_path: Path, recwarn):
    plots.draw_u_curves({("uniform", 0.0, 1): Estimate(3.0, None)}, tmp_path / "u.png")
    assert (tmp_path / "u.png").read_bytes().startswith(b"\x89PNG")
    assert [str(warning.message) for warning in recwarn] == []


def test_styles_of_many_methods_and_lengths_differ():
    styles = [plots._style(number, length) for number in range(24) for length in range(4)]
    assert len({str(style) for style in styles}) == len(styles)
    lengths = [plots._style(0, length) for length in range(16)]
    assert len({str(style) for style in lengths}) == 16
    # Dotted lines mark the switch.
    assert not {":", (0, (1, 1))} & {style["linestyle"] for style in styles}
