"""A grid's runs, and what is read of them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tst.config import UserError, dump_config, load_config
from megatron_tst.planning.sweep import NOT_STARTED, Runner, SweepPoint, losses_by_point, plan_sweep, read_result
from tests.telemetry.finished import write_run
from tests.training.runs import arguments

FLAGS = arguments("corpus", "tokenizer.json", Path("unused"))


def planned(tmp_path, sizes=(2, 4), ratios=(0.25, 0.5), weights=("uniform",), seeds=(1, 2), flags=FLAGS):
    return plan_sweep(sizes, ratios, weights, seeds, tmp_path, flags)


def test_a_grid_is_the_baseline_and_every_combination(tmp_path: Path):
    runs = planned(tmp_path, weights=("uniform", "power_law"))
    assert len(runs) == 2 + 2 * 2 * 2 * 2
    assert [run.name for run in runs[:4]] == ["baseline-seed1", "baseline-seed2", "s2-r0.25-seed1", "s2-r0.25-seed2"]
    assert runs[-1].name == "s4-r0.5-power_law-seed2"
    assert len({run.name for run in runs}) == len(runs)
    config = runs[-1].config
    assert [(phase.bag_size, phase.num_steps) for phase in config.schedule.phases] == [(4, 4), (1, 4)]
    assert (config.superposition.tst_bag_weights, config.training.seed) == ("power_law", 2)
    assert [(phase.bag_size, phase.num_steps) for phase in runs[0].config.schedule.phases] == [(1, 8)]


def test_all_settings_are_checked_before_anything_runs(tmp_path: Path):
    for wrong, message in (
        ({"sizes": (1,)}, "--bag-sizes 1: must be above 1"),
        ({"ratios": (1.5,)}, "--step-ratios 1.5: must lie"),
        ({"weights": ("odd",)}, "--tst-bag-weights"),
        ({"seeds": (1, 1)}, "--seeds 1 1: names a value twice"),
        ({"ratios": (0.01,)}, "--step-ratios 0.01: is less than one of 8 steps"),
        ({"flags": [*FLAGS, "--eval-iters", "0"]}, "--eval-iters 0: a grid compares"),
        ({"flags": [*FLAGS, "--lr-decay-iters", "9"]}, "--lr-decay-iters 9: is more than the runs' 8 steps"),
        ({"flags": [*FLAGS, "--global-batch-size", "3"]}, "--global-batch-size 3"),
    ):
        with pytest.raises(UserError, match=message):
            planned(tmp_path, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_what_has_ended_is_not_run_again_and_other_settings_are_refused(tmp_path: Path):
    run = planned(tmp_path, sizes=(4,), ratios=(0.5,), seeds=(1,))[1]
    assert not run.is_complete
    write_run(run.directory.path, [3.0, 2.5])
    with pytest.raises(UserError, match="holds a run with other settings"):
        _ = run.is_complete
    run.directory.config.write_text(dump_config(run.config))
    assert run.is_complete
    # Killed in its last evaluation: all steps are logged.
    lines = run.directory.metrics.read_text().splitlines(keepends=True)
    steps = [line for line in lines if "valid_loss" not in line]
    assert len(steps) < len(lines)
    run.directory.metrics.write_text("".join(steps))
    assert not run.is_complete


PROGRAM = """
import os, sys, pathlib, signal
name = sys.argv[len(sys.argv) - sys.argv[::-1].index("--tst-run-dir")]
pathlib.Path(name + ".env").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
if "s4" in name:
    signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(name + ".stopped").write_text(""), os._exit(75)))
    pathlib.Path(name + ".begun").write_text("")
    signal.pause()
print("the last word of", name)
sys.exit(2 if "mistake" in name else 3 if "s2" in name else 0)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_runs_end_well_or_with_their_last_line(tmp_path: Path, program):
    runs = planned(tmp_path, sizes=(2,), ratios=(0.25, 0.5), seeds=(1,))
    ends = {run.name: failure for run, failure in Runner(program, 2, []).run_all(runs)}
    assert ends["baseline-seed1"] is None
    for name in ("s2-r0.25-seed1", "s2-r0.5-seed1"):
        assert ends[name] == f"exit code 3: the last word of {tmp_path / name} ({tmp_path / name}.out)"


def test_a_users_mistake_is_met_once(tmp_path: Path, program):
    runs = planned(tmp_path / "mistake", sizes=(2, 4), ratios=(0.25, 0.5), seeds=(1,))
    (tmp_path / "mistake").mkdir()
    first, *others = [failure for _, failure in Runner(program, 1, []).run_all(runs)]
    assert first.startswith("exit code 2: the last word")
    assert others == [NOT_STARTED] * 4


def test_each_run_has_a_gpu_of_its_own(tmp_path: Path, program):
    runs = planned(tmp_path, sizes=(2,), ratios=(0.25, 0.5), seeds=(1, 2))
    list(Runner(program, 2, ["4", "GPU-7"]).run_all(runs))
    seen = {path.read_text() for path in tmp_path.glob("*.env")}
    assert seen == {"4", "GPU-7"}
    list(Runner(program, 1, []).run_all(runs[:1]))
    assert (tmp_path / "baseline-seed1.env").read_text() in ("none", "")


def test_an_interruption_stops_what_runs_and_starts_nothing(tmp_path: Path, program):
    """The generator is closed after the baseline has ended, while s4 waits for its signal and s8 for its turn."""
    runs = planned(tmp_path, sizes=(4, 8), ratios=(0.5,), seeds=(1,))
    begun = tmp_path / "s4-r0.5-seed1.begun"
    ends = Runner(program, 1, []).run_all(runs)
    assert next(ends)[0].name == "baseline-seed1"
    for _ in range(1000):
        if begun.exists():
            break
        subprocess.run([sys.executable, "-c", ""], check=True)
    ends.close()
    assert (tmp_path / "s4-r0.5-seed1.stopped").exists()
    assert not (tmp_path / "s8-r0.5-seed1.env").exists()


def test_a_finished_run_is_a_point(tmp_path: Path):
    for seed, last in ((1, 2.4), (2, 2.6)):
        write_run(tmp_path / f"s4-{seed}", [5.0, 3.0, 3.0, last], bag_size=4, superposed=1, seed=seed)
        write_run(tmp_path / f"base-{seed}", [4.0, 3.0, 2.9, 2.8], seed=seed)
    results = [read_result(path) for path in sorted(tmp_path.iterdir(), reverse=True)]
    assert results[0].point == SweepPoint("uniform", 0.25, 4)
    assert (results[0].seed, results[0].final_loss, results[0].data_tokens) == (2, 2.6, 64 * (10 * 4 + 30))
    losses = losses_by_point(results)
    assert [(point.bag_size, loss.value) for point, loss in losses.items()] == [
        (1, pytest.approx(2.8)), (4, pytest.approx(2.5))
    ]  # fmt: skip
    assert losses[SweepPoint("uniform", 0.25, 4)].error == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"valid": [5.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0], "superposed": 2, "seed": 2}, "more than a grid does"),
        ({"valid": [5.0, 3.0, 3.0, 2.0], "superposed": 1, "seed": 1}, "has the setting and seed of one"),
    ],
)
def test_runs_of_another_grid_or_twice_are_refused(tmp_path: Path, other, message):
    write_run(tmp_path / "one", [5.0, 3.0, 3.0, 2.4], bag_size=4, superposed=1)
    write_run(tmp_path / "other", bag_size=4, **other)
    with pytest.raises(UserError, match=message):
        losses_by_point([read_result(tmp_path / name) for name in ("one", "other")])


def test_runs_of_another_objective_are_no_seeds_of_a_point(tmp_path: Path):
    for seed in (1, 2):
        write_run(tmp_path / f"base{seed}", [4.0, 3.0, 2.9, 2.8], seed=seed)
        write_run(tmp_path / f"tst{seed}", [5.0, 3.0, 3.0, 2.4], bag_size=4, superposed=1, seed=seed)
    assert len(losses_by_point([read_result(path) for path in tmp_path.iterdir()])) == 2
    for changed, refused in (("base2", False), ("tst2", True)):
        config = load_config(tmp_path / changed / "config.yaml")
        other = dataclasses.replace(config.superposition, tst_objective="mce_alt")
        (tmp_path / changed / "config.yaml").write_text(dump_config(dataclasses.replace(config, superposition=other)))
        results = [read_result(path) for path in sorted(tmp_path.iterdir())]
        if refused:
            with pytest.raises(UserError, match="tst2: superposes otherwise than tst1"):
                losses_by_point(results)
        else:
            assert len(losses_by_point(results)) == 2


def test_a_run_of_many_phases_is_no_point(tmp_path: Path):
    folder = write_run(tmp_path / "run", [3.0, 2.5])
    phases = "phases: [{bag_size: 4, steps: 5}, {bag_size: 2, steps: 5}, {bag_size: 1, steps: 10}]\n"
    (folder / "config.yaml").write_text(phases)
    with pytest.raises(UserError, match="has 3 phases"):
        read_result(folder)
