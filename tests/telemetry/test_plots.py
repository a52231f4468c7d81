"""What pictures show: no end of a run lies outside."""

from pathlib import Path

import matplotlib.figure
import pytest

from megatron_tst.config import UserError
from megatron_tst.telemetry import plots
from megatron_tst.telemetry.compare import Estimate, find_methods
from megatron_tst.telemetry.curves import read_curve
from megatron_tst.telemetry.pictures import check_picture
from tests.telemetry.finished import write_run

CURVES = {
    "one evaluation each": ([2.6], [2.5]),
    "equal": ([2.5], [2.5]),
    "a high end": ([9.0, 3.0, 2.9], [9.0, 8.0, 7.0]),
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
    assert sorted(labels) == ["baseline (s = 1)", "r = 0.2", "r = 0.4"]


def test_a_picture_that_cannot_be_drawn_is_refused_before_long_work(tmp_path: Path, monkeypatch):
    check_picture(tmp_path / "new" / "c.svg", "--output")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*c\.svg: .*file is no folder"):
        check_picture(tmp_path / "file" / "c.svg", "--output")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the package matplotlib"):
        check_picture(tmp_path / "c.svg", "--output")
