"""Results of a grid's runs: settings, means over seeds, differences from the baseline of the same seed."""

import dataclasses
from pathlib import Path
from statistics import fmean, stdev

import pytest

from megatron_tst.analysis.sweep_results import final_loss_curves, gather, read_result
from megatron_tst.config import UserError, dump_config, load_config
from tests.telemetry.finished import write_run


def rewrite(folder: Path, section: str, **values) -> None:
    """Change settings of a finished run."""
    config = load_config(folder / "config.yaml")
    changed = dataclasses.replace(getattr(config, section), **values)
    (folder / "config.yaml").write_text(dump_config(dataclasses.replace(config, **{section: changed})))


def read_all(folder: Path):
    return gather([read_result(path) for path in sorted(folder.iterdir())])


def write_pair(folder: Path, seed: int, baseline: float, bags: float, **superposition) -> None:
    write_run(folder / f"base-{seed}", [4.0, 3.0, 2.9, baseline], seed=seed)
    write_run(folder / f"tst-{seed}", [5.0, 3.0, 3.0, bags], bag_size=4, superposed=1, seed=seed)
    if superposition:
        rewrite(folder / f"tst-{seed}", "superposition", **superposition)


def test_differences_are_taken_seed_by_seed(tmp_path: Path):
    """Losses scatter by tenths between seeds, but paired differences only by hundredths."""
    ends = {1: (2.8, 2.5), 2: (3.1, 2.79), 3: (2.6, 2.31)}
    for seed, (baseline, bags) in ends.items():
        write_pair(tmp_path, seed, baseline, bags)
    baseline, bags = read_all(tmp_path)
    assert (baseline.phases, bags.phases) == ((), ((4, 0.25),))
    assert (baseline.label, bags.label) == ("baseline", "s = 4; r = 0.25")
    gaps = [ours - theirs for theirs, ours in ends.values()]
    assert bags.differences() == {seed: pytest.approx(gap) for seed, gap in zip(ends, gaps, strict=True)}
    assert bags.less_baseline.value == pytest.approx(fmean(gaps))
    assert bags.less_baseline.error == pytest.approx(stdev(gaps) / 3**0.5)
    assert bags.less_baseline.error < 0.01 < 0.1 < bags.final_loss.error
    assert (baseline.differences(), baseline.less_baseline) == ({}, None)
    assert bags.final_loss.value == pytest.approx(fmean([2.5, 2.79, 2.31]))


def test_seeds_without_a_baseline_have_no_difference(tmp_path: Path):
    for seed in (1, 2):
        write_pair(tmp_path, seed, 2.8, 2.5 + 0.1 * seed)
    write_run(tmp_path / "tst-3", [5.0, 3.0, 3.0, 2.0], bag_size=4, superposed=1, seed=3)
    _, bags = read_all(tmp_path)
    assert (len(bags.runs), sorted(bags.differences())) == (3, [1, 2])
    assert bags.less_baseline.value == pytest.approx(-0.15)
    (alone,) = gather([read_result(tmp_path / "tst-3")])
    assert (alone.less_baseline, alone.final_loss.error) == (None, None)


def test_different_settings_are_separated_and_named(tmp_path: Path):
    write_pair(tmp_path / "a", 1, 2.8, 2.5)
    for name, superposition in (
        ("b", {"tst_objective": "mce_alt"}),
        ("c", {"tst_reinitialize_at_switch": True}),
        ("d", {"tst_bag_weights": "power_law"}),
    ):
        write_pair(tmp_path / name, 1, 2.8, 2.6, **superposition)
    folders = [tmp_path / "a" / "base-1", *(tmp_path / name / "tst-1" for name in "abcd")]
    settings = gather([read_result(folder) for folder in folders])
    assert [setting.label for setting in settings] == [
        "baseline",
        "s = 4; r = 0.25, bag weights uniform, objective mce",
        "s = 4; r = 0.25, bag weights uniform, objective mce, reinitialize at switch",
        "s = 4; r = 0.25, bag weights uniform, objective mce_alt",
        "s = 4; r = 0.25, bag weights power_law, objective mce",
    ]
    assert [setting.less_baseline.value for setting in settings[1:]] == pytest.approx([-0.3, -0.2, -0.2, -0.2])
    assert final_loss_curves(settings) is None


def test_a_setting_is_compared_with_the_baseline_of_equal_settings(tmp_path: Path):
    for rate, baseline in ((0.1, 2.8), (0.2, 2.6)):
        folder = tmp_path / f"{rate}"
        write_pair(folder, 1, baseline, 2.5)
        for run in folder.iterdir():
            rewrite(run, "optimizer", lr=rate)
    settings = gather([read_result(run) for run in sorted(tmp_path.glob("*/*"))])
    assert [(setting.label, setting.less_baseline and setting.less_baseline.value) for setting in settings] == [
        ("baseline, lr 0.1", None), ("baseline, lr 0.2", None),
        ("s = 4; r = 0.25, lr 0.1", pytest.approx(-0.3)), ("s = 4; r = 0.25, lr 0.2", pytest.approx(-0.1)),
    ]  # fmt: skip


def test_lengths_are_settings_in_one_column(tmp_path: Path):
    write_pair(tmp_path, 1, 2.8, 2.5)
    write_run(tmp_path / "base-long", [4.0] * 7 + [2.7])
    write_run(tmp_path / "tst-long", [4.0] * 7 + [2.3], bag_size=4, superposed=2)
    for name in ("base-long", "tst-long"):
        rewrite(tmp_path / name, "optimizer", lr_warmup_iters=4)
    settings = read_all(tmp_path)
    assert [setting.label for setting in settings] == [
        "baseline, steps 40", "baseline, steps 80", "s = 4; r = 0.25, steps 40", "s = 4; r = 0.25, steps 80"
    ]  # fmt: skip
    assert [setting.less_baseline.value for setting in settings[2:]] == pytest.approx([-0.3, -0.4])


def test_lists_of_phases_are_settings(tmp_path: Path):
    write_pair(tmp_path, 1, 2.8, 2.5)
    folder = write_run(tmp_path / "list", [4.0, 3.0, 2.9, 2.4])
    config = load_config(folder / "config.yaml")
    phases = "phases: [{bag_size: 8, steps: 4}, {bag_size: 2, steps: 8}, {bag_size: 1, steps: 28}]\n"
    text = dump_config(config).replace("phases: []\n", phases)
    assert phases in text
    (folder / "config.yaml").write_text(text)
    settings = read_all(tmp_path)
    assert [setting.label for setting in settings] == ["baseline", "s = 8, 2; r = 0.1, 0.2", "s = 4; r = 0.25"]
    assert final_loss_curves(settings) is None


def test_runs_of_other_text_and_duplicate_runs_are_refused(tmp_path: Path):
    write_pair(tmp_path, 1, 2.8, 2.5)
    write_run(tmp_path / "twin", [5.0, 3.0, 3.0, 2.4], bag_size=4, superposed=1, seed=1)
    with pytest.raises(UserError, match="twin: has the setting and seed of tst-1"):
        read_all(tmp_path)
    rewrite(tmp_path / "twin", "data", split="9,1,0")
    with pytest.raises(UserError, match="twin: differs from base-1 in --split, so its loss covers other tokens"):
        read_all(tmp_path)


def write_grid(folder: Path, sizes, ratios, weights):
    write_run(folder / "base", [4.0, 3.0, 2.9, 2.8])
    for size in sizes:
        for superposed in ratios:
            for kind in weights:
                run = write_run(folder / f"{size}-{superposed}-{kind}", [4.0, 3.0, 2.9, 2.5], size, superposed)
                rewrite(run, "superposition", tst_bag_weights=kind)
    return final_loss_curves(read_all(folder))


def test_curves_are_drawn_over_the_varied_setting(tmp_path: Path):
    uniform, both = ["uniform"], ["uniform", "power_law"]
    size_axis, ratio_axis = "bag size s (data tokens per position)", "step ratio r (fraction of the steps with bags)"
    for number, (sizes, ratios, weights, axis, panels) in enumerate((
        ((2, 4), (1, 2), uniform, size_axis, {"uniform bag weights": ["step ratio r = 0.25", "step ratio r = 0.5"]}),
        ((2, 4), (1,), both, size_axis, {"step ratio r = 0.25": ["power law bag weights", "uniform bag weights"]}),
        ((2, 4), (1, 2), both, size_axis, {
            "power law bag weights": ["step ratio r = 0.25", "step ratio r = 0.5"],
            "uniform bag weights": ["step ratio r = 0.25", "step ratio r = 0.5"],
        }),
        ((4,), (1, 2, 3), uniform, ratio_axis, {"uniform bag weights": ["bag size s = 4"]}),
    )):  # fmt: skip
        curves = write_grid(tmp_path / str(number), sizes, ratios, weights)
        assert curves.axis == axis
        assert {title: sorted(lines) for title, lines in curves.panels.items()} == panels
        values = {size_axis: sizes, ratio_axis: [ratio / 4 for ratio in ratios]}[axis]
        assert all(sorted(line) == sorted(values) for lines in curves.panels.values() for line in lines.values())
    assert write_grid(tmp_path / "one point", (4,), (1,), both) is None
