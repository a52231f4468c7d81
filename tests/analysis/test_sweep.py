"""The runs of a grid: their number, their settings and their completion."""

import dataclasses
from pathlib import Path

import pytest

from megatron_tst.analysis.sweep import Grid, grid_phases, plan_sweep, read_phases
from megatron_tst.config import UserError, dump_config, parse_config
from tests.telemetry.finished import write_run
from tests.training.runs import arguments

FLAGS = arguments("corpus", "tokenizer.json", Path("unused"))
WSD = "--lr-decay-style WSD --lr-decay-iters 8 --lr-wsd-decay-iters 4 --lr-wsd-decay-style linear".split()


def planned(tmp_path, sizes=(2, 4), ratios=(0.25, 0.5), weights=("uniform",), seeds=(1, 2), flags=FLAGS, **varied):
    varied = {"phases": grid_phases(sizes, ratios), **varied}
    return plan_sweep(Grid(bag_weights=weights, seeds=seeds, **varied), tmp_path, flags)


def phases_of(run) -> list[tuple[int, int]]:
    return [(phase.bag_size, phase.num_steps) for phase in run.config.schedule.phases]


def test_a_grid_contains_the_baseline_and_every_combination(tmp_path: Path):
    runs = planned(tmp_path, weights=("uniform", "power_law"))
    assert len(runs) == 2 + 2 * 2 * 2 * 2
    # The order is seed by seed, so the finished runs of a stopped grid have their baselines.
    assert [run.name for run in runs[:3]] == ["baseline-seed1", "s2-r0.25-seed1", "s4-r0.25-seed1"]
    assert [run.name for run in runs[9:11]] == ["baseline-seed2", "s2-r0.25-seed2"]
    assert runs[-1].name == "s4-r0.5-power_law-seed2"
    assert len({run.name for run in runs}) == len(runs)
    assert phases_of(runs[-1]) == [(4, 4), (1, 4)]
    assert (runs[-1].config.superposition.tst_bag_weights, runs[-1].config.training.seed) == ("power_law", 2)
    assert phases_of(runs[0]) == [(1, 8)]


def test_a_run_equals_the_one_that_its_flags_describe(tmp_path: Path):
    """Runs that earlier versions started by flags are recognized, and the settings of new runs survive a round trip."""
    baseline, run = planned(tmp_path, sizes=(4,), ratios=(0.25,), seeds=(2,))
    for one, own in ((baseline, "1 0.0 uniform"), (run, "4 0.25 uniform")):
        size, ratio, weights = own.split()
        argv = [*FLAGS, "--tst-bag-size", size, "--tst-step-ratio", ratio, "--tst-bag-weights", weights, "--seed", "2"]
        folder = one.directory.path
        expected = parse_config([*argv, "--tst-run-dir", str(folder), "--load", str(folder / "checkpoints")])
        assert one.config == expected
        one.write_settings()
        assert dataclasses.replace(parse_config(one.argv), config=()) == expected
    assert [run.name for run in (baseline, run)] == ["baseline-seed2", "s4-r0.25-seed2"]


def test_only_superposition_settings_share_a_baseline(tmp_path: Path):
    settings = {
        "tst_superpose": ["both", "output"],
        "lr": ["1e-2", "2e-2"],
        "tst_reinitialize_at_switch": ["false", "True"],
    }
    runs = planned(tmp_path, sizes=(4,), ratios=(0.5,), seeds=(1,), settings=settings)
    assert sorted(run.name for run in runs) == sorted([
        # 1e-2 is the learning rate in the flags, and names omit values that equal the flags.
        "baseline-seed1", "baseline-lr_0.02-seed1",
        "s4-r0.5-seed1", "s4-r0.5-reinitialize_at_switch-seed1",
        "s4-r0.5-lr_0.02-seed1", "s4-r0.5-lr_0.02-reinitialize_at_switch-seed1",
        "s4-r0.5-superpose_output-seed1", "s4-r0.5-superpose_output-reinitialize_at_switch-seed1",
        "s4-r0.5-superpose_output-lr_0.02-seed1", "s4-r0.5-superpose_output-lr_0.02-reinitialize_at_switch-seed1",
    ])  # fmt: skip
    named = {run.name: run.config for run in runs}
    changed = named["s4-r0.5-superpose_output-lr_0.02-reinitialize_at_switch-seed1"]
    assert (changed.optimizer.lr, changed.superposition.tst_superpose) == (0.02, "output")
    assert changed.superposition.tst_reinitialize_at_switch
    assert not changed.schedule.phases[0].reads_bags
    assert named["baseline-lr_0.02-seed1"].optimizer.lr == 0.02
    flagged = planned(tmp_path, seeds=(1,), flags=[*FLAGS, "--tst-reinitialize-at-switch"])
    assert [run.config.superposition.tst_reinitialize_at_switch for run in flagged[:2]] == [False, True]


def test_lists_of_phases_are_planned(tmp_path: Path):
    phases = [read_phases("4:0.25,2:0.25"), read_phases("4:0.5,2:0.5"), read_phases("4:0.5")]
    _, mixed, whole, pair = planned(tmp_path, seeds=(1,), phases=phases)
    assert [mixed.name, whole.name] == ["s4-r0.25-s2-r0.25-seed1", "s4-r0.5-s2-r0.5-seed1"]
    assert (phases_of(mixed), phases_of(whole)) == ([(4, 2), (2, 2), (1, 4)], [(4, 4), (2, 4)])
    assert pair.name == "s4-r0.5-seed1"
    assert (pair.config.phases, pair.config.superposition.tst_bag_size) == ((), 4)
    mixed.write_settings()
    assert parse_config(mixed.argv).schedule == mixed.config.schedule
    _, one_side, _, _ = planned(tmp_path, seeds=(1,), phases=phases, flags=[*FLAGS, "--tst-superpose", "output"])
    assert [phase.reads_bags for phase in one_side.config.phases] == [False, False, True]
    # The ends of the phases are rounded, not their lengths: 2.67 and 5.33 of 8 steps.
    _, thirds = planned(tmp_path, seeds=(1,), phases=[read_phases("4:0.3333,2:0.3333")])
    assert phases_of(thirds) == [(4, 3), (2, 2), (1, 3)]


def test_the_grids_phases_replace_those_of_the_file(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("phases: [{bag_size: 8, steps: 3}, {bag_size: 1, steps: 5}]\n")
    flags = [*FLAGS, "--config", str(tmp_path / "base.yaml")]
    baseline, run = planned(tmp_path, sizes=(4,), ratios=(0.5,), seeds=(1,), flags=flags)
    assert (phases_of(baseline), phases_of(run)) == ([(1, 8)], [(4, 4), (1, 4)])


def test_warm_up_decay_and_intervals_scale_with_the_length(tmp_path: Path):
    phases = [read_phases("4:0.25,2:0.25")]
    runs = planned(tmp_path, seeds=(1,), phases=phases, lengths=(8, 80, 4), flags=[*FLAGS, *WSD])
    assert [run.name for run in runs] == [
        "baseline-seed1", "s4-r0.25-s2-r0.25-seed1",
        "baseline-80steps-seed1", "s4-r0.25-s2-r0.25-80steps-seed1",
        "baseline-4steps-seed1", "s4-r0.25-s2-r0.25-4steps-seed1",
    ]  # fmt: skip
    counts = [
        (o.lr_warmup_iters, o.lr_decay_iters, o.lr_wsd_decay_iters, run.config.training.eval_interval)
        for run in runs[1::2]
        for o in (run.config.optimizer,)
    ]
    assert counts == [(2, 8, 4, 4), (20, 80, 40, 40), (1, 4, 2, 2)]
    assert phases_of(runs[3]) == [(4, 20), (2, 20), (1, 40)]
    assert runs[1].config.logging.log_interval == 1


def test_all_settings_are_checked_before_any_run_starts(tmp_path: Path):
    for wrong, message in (
        ({"sizes": (1,)}, "--bag-sizes 1: must be above 1"),
        ({"ratios": (1.5,)}, "--step-ratios 1.5: must be above 0"),
        ({"weights": ("odd",)}, "--tst-bag-weights"),
        ({"seeds": (1, 1)}, "--seeds 1 1: holds a value twice"),
        ({"ratios": (0.01,)}, "--step-ratios 0.01: the fraction 0.01 of 8 steps is less than one"),
        ({"phases": [((4, 0.5), (2, 0.01))]}, "--phases 4:0.5,2:0.01: the fraction 0.01 of 8 steps"),
        ({"lengths": (0,)}, "--steps 0: must be above 0"),
        ({"settings": {"seed": ["3"]}}, "--vary seed: use --seeds"),
        ({"settings": {"train_iters": ["3"]}}, "--vary train_iters: use --steps"),
        ({"settings": {"rate": ["3"]}}, "--vary rate: is not a setting of pretrain_tst.py"),
        ({"settings": {"lr": ["-1"]}}, "--min-lr 0.0: must lie between 0 and --lr|--lr"),
        ({"settings": {"lr": ["1e-2", "0.01"]}}, "baseline: the grid holds this setting twice"),
        ({"settings": {"bf16": ["yes"]}}, "--vary bf16 yes: must be true or false"),
        ({"settings": {"tst_objective": ["mce_alt"]}, "weights": ("power_law",)}, "mce_alt: uses no bag weights"),
        ({"flags": [*FLAGS, "--eval-iters", "0"]}, "--eval-iters 0: a grid compares"),
        ({"flags": [*FLAGS, "--lr-decay-iters", "9"]}, "--lr-decay-iters 9: exceeds the runs' 8 steps"),
        ({"flags": [*FLAGS, "--global-batch-size", "3"]}, "--global-batch-size 3"),
        ({"flags": FLAGS[:2]}, "--train-iters None: must be given"),
    ):
        with pytest.raises(UserError, match=message):
            planned(tmp_path, **wrong)
    for text in ("4", "4:x", "1:0.5", "4:0", "4:0.6,2:0.5", ""):
        with pytest.raises(UserError, match=f"--phases {text}: must be bag sizes"):
            read_phases(text)
    assert list(tmp_path.iterdir()) == []


def test_finished_runs_are_kept_and_other_settings_are_refused(tmp_path: Path):
    run = planned(tmp_path, sizes=(4,), ratios=(0.5,), seeds=(1,))[1]
    assert not run.is_complete
    write_run(run.directory.path, [3.0, 2.5])
    with pytest.raises(UserError, match="holds a run with other settings"):
        _ = run.is_complete
    text = dump_config(run.config)
    run.directory.config.write_text(text)
    assert run.is_complete
    # The file was written by a version that had fewer settings.
    older = [line for line in text.splitlines(keepends=True) if "tst_reinitialize_at_switch" not in line]
    run.directory.config.write_text("".join(older))
    assert len(older) < len(text.splitlines()) and run.is_complete
    # A run that was killed in its last evaluation has logged all steps.
    lines = run.directory.metrics.read_text().splitlines(keepends=True)
    steps = [line for line in lines if "valid_loss" not in line]
    assert len(steps) < len(lines)
    run.directory.metrics.write_text("".join(steps))
    assert not run.is_complete
