"""Contents of the plots; in particular, the end of every run is visible."""

import math
from pathlib import Path

import matplotlib.figure
import matplotlib.text
import pytest

from megatron_tst.analysis import plots
from megatron_tst.analysis.compare import Estimate, find_methods
from megatron_tst.analysis.curves import read_curve
from tests.telemetry.finished import write_run

CURVES = {
    "one evaluation each": ([2.6], [2.5]),
    "equal": ([2.5], [2.5]),
    "a high end": ([9.0, 3.0, 2.9], [9.0, 8.0, 7.0]),
    "an evaluation that is no number": ([math.nan, 3.0, 2.9], [9.0, math.inf, 2.5]),
    "a high start": ([9.0, *[2.9] * 20, 2.5], [9.5, *[2.9] * 20, 2.4]),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_ends_of_all_runs_are_visible(tmp_path: Path, name, monkeypatch):
    drawn = []
    set_limits = plots.set_loss_limits

    def recording(plot, groups):
        set_limits(plot, groups)
        drawn.append(plot.get_ylim())

    monkeypatch.setattr(plots, "set_loss_limits", recording)
    for number, losses in enumerate(CURVES[name]):
        write_run(tmp_path / str(number), losses, seed=number)
    methods = find_methods(read_curve(tmp_path / str(number)) for number in (0, 1))
    plots.draw_comparison(methods, tmp_path / "c.png", ["steps", "data_tokens"])
    assert len(drawn) == 2
    for low, high in drawn:
        assert all(low < losses[-1] < high for losses in CURVES[name])
        if name == "a high start":
            assert high < 9.0


@pytest.fixture
def figures(monkeypatch) -> list[matplotlib.figure.Figure]:
    """The list of all figures that a test draws."""
    made, make = [], matplotlib.figure.Figure
    monkeypatch.setattr(matplotlib.figure, "Figure", lambda **named: made.append(make(**named)) or made[-1])
    return made


def assert_letters_are_large(figure) -> None:
    """Assert that all text has at least 16 pixels in a figure that is shown 800 pixels wide."""
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
    assert len(texts) > 10
    assert min(text.get_fontsize() / 72 * 800 / figure.get_figwidth() for text in texts) >= 16


def write_seeds(folder: Path):
    """Return two methods with three seeds each; the second has two lengths and bags."""
    for seed, shift in ((1, 0.0), (2, 0.1), (3, 0.2)):
        write_run(folder / f"base-{seed}", [4.0 + shift, 3.0 + shift, 2.5 + shift, 2.0 + shift], seed=seed)
        write_run(folder / f"tst-{seed}", [7.0, 6.0, 2.4 + shift, 1.8 + shift], 4, 2, seed=seed)
        write_run(folder / f"short-{seed}", [7.0, 1.9 + shift], 4, 1, seed=seed)
    names = [f"{name}-{seed}" for name in ("base", "tst", "short") for seed in (1, 2, 3)]
    return find_methods(read_curve(folder / name) for name in names)


def test_curves_span_the_whole_run_and_show_their_error(tmp_path: Path, figures):
    methods = write_seeds(tmp_path)
    plots.draw_comparison(methods, tmp_path / "c.png", ["steps", "flops"])
    steps, flops, ends, _ = figures[0].axes
    for plot, most in ((steps, 40), (flops, 4e9), (ends, 4e9)):
        low, high = plot.get_xlim()
        assert low == 0 and most < high < 1.05 * most
    lines = {line.get_label(): line for line in steps.lines}
    mean = lines["base (s = 1; 3 seeds)"]
    assert list(mean.get_xdata()) == [10, 20, 30, 40]
    assert list(mean.get_ydata()) == pytest.approx([4.1, 3.1, 2.6, 2.1])
    thin = [line for line in steps.lines if line.get_linewidth() == pytest.approx(0.7)]
    assert sorted(line.get_ydata()[-1] for line in thin) == pytest.approx([1.8, 1.9, 1.9, 2.0, 2.0, 2.0, 2.1, 2.1, 2.2])
    error = 0.1 / 3**0.5
    band = steps.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((2.1 - error, 4.1 + error))
    # A line with an error band marks the baseline's end.
    across = lines["end of base"]
    assert list(across.get_ydata()) == pytest.approx([2.1, 2.1]) and list(across.get_xdata()) == [0, 1]
    box = steps.patches[0].get_extents().transformed(steps.transData.inverted())
    assert (box.y0, box.y1) == pytest.approx((2.1 - error, 2.1 + error))
    # High losses of phases with bags do not flatten the rest.
    assert steps.get_ylim()[1] < 5
    assert_letters_are_large(figures[0])


def test_runs_evaluated_at_different_steps_have_no_mean(tmp_path: Path, figures):
    write_run(tmp_path / "base-1", [4.0, 3.0], seed=1)
    write_run(tmp_path / "base-2", [4.0, 2.9], seed=2)
    metrics = tmp_path / "base-2" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    first = next(line for line in lines if "valid_loss" in line)
    metrics.write_text("".join(line for line in lines if line != first))
    plots.draw_comparison(
        find_methods(read_curve(tmp_path / f"base-{n}") for n in (1, 2)), tmp_path / "c.png", ["steps"]
    )
    plot = figures[0].axes[0]
    assert [list(line.get_ydata()) for line in plot.lines[:2]] == [[4.0, 3.0], [2.9]]
    assert len(plot.get_legend_handles_labels()[1]) == 2


def test_each_title_has_a_panel_and_each_label_a_line(tmp_path: Path, figures):
    line = {2: Estimate(2.9, None), 4: Estimate(2.8, 0.1)}
    panels = {title: {"r = 0.2": line, "r = 0.4": line} for title in ("uniform", "power law")}
    plots.draw_final_losses(panels, (1, Estimate(3.0, 0.1)), "bag size", tmp_path / "u.svg")
    assert [plot.get_title() for plot in figures[0].axes] == ["uniform", "power law"]
    for plot in figures[0].axes:
        assert sorted(plot.get_legend_handles_labels()[1]) == ["baseline", "r = 0.2", "r = 0.4"]
        assert [tick.get_text() for tick in plot.get_xticklabels()] == ["1", "2", "4"]
        across = next(line for line in plot.lines if line.get_label() == "baseline")
        assert list(across.get_ydata()) == [3.0, 3.0] and list(across.get_xdata()) == [0, 1]
    assert_letters_are_large(figures[0])


def test_each_setting_has_a_row(tmp_path: Path, figures, recwarn):
    rows = [
        ("baseline", [3.0, 3.2], None),
        ("s = 4; r = 0.3, reinitialize at switch", [2.9, 2.95], Estimate(-0.175, 0.075)),
        ("s = 2; r = 0.3", [3.3], Estimate(0.3, None)),
    ]
    plots.draw_settings(rows, Estimate(3.1, 0.1), tmp_path / "s.png")
    plot, beside = figures[0].axes
    labels = [tick.get_text().replace("\n", " ") for tick in plot.get_yticklabels()]
    assert labels == [label for label, _, _ in rows]
    assert [tick.get_text() for tick in beside.get_yticklabels()] == ["", "-0.1750 ± 0.0750", "+0.3000"]
    dots = [list(line.get_xdata()) for line in plot.lines if line.get_marker() == "o"]
    assert dots == [losses for _, losses, _ in rows]
    diamonds = [float(line.get_xdata()[0]) for line in plot.lines if line.get_marker() == "D"]
    assert diamonds == pytest.approx([3.1, 2.925, 3.3])
    assert plot.yaxis_inverted() and beside.yaxis_inverted()
    assert_letters_are_large(figures[0])
    plots.draw_settings(rows[:1], None, tmp_path / "alone.png")
    assert (tmp_path / "alone.png").read_bytes().startswith(b"\x89PNG")
    assert [str(warning.message) for warning in recwarn] == []


def test_styles_of_many_methods_and_lengths_differ():
    styles = [plots.line_style(number, length) for number in range(24) for length in range(4)]
    assert len({str(style) for style in styles}) == len(styles)
    lengths = [plots.line_style(0, length) for length in range(16)]
    assert len({str(style) for style in lengths}) == 16
    # Dotted lines mark the switch.
    assert not {":", (0, (1, 1))} & {style["linestyle"] for style in styles}
