import dataclasses
from pathlib import Path

from megatron_tst.telemetry import MetricsFile, ValidMetrics
from megatron_tst.telemetry.compare import compare, read_curve, speed_up_at_equal_loss
from tests.telemetry.lines import STEP
from tests.training.runs import start


def write_run(folder: Path, bag_sizes: list[int], valid: list[float]) -> Path:
    """A run of 10 steps per entry, evaluated every 10 steps."""
    folder.mkdir()
    file, tokens = MetricsFile(folder / "metrics.jsonl"), 0
    for number, (bag_size, loss) in enumerate(zip(bag_sizes, valid, strict=True), start=1):
        tokens += 10 * 64 * bag_size
        phase, kind = (0, "mce") if bag_size > 1 else (int(bag_sizes[0] > 1), "ce")
        file.write(
            dataclasses.replace(
                STEP, step=10 * number, phase=phase, bag_size=bag_size, loss_kind=kind, loss=loss, data_tokens=tokens,
                positions=number * 640,
            )
        )  # fmt: skip
        file.write(ValidMetrics(10 * number, loss, None, tokens, number * 640))
    file.close()
    return folder


def runs(tmp_path: Path):
    baseline = write_run(tmp_path / "baseline", [1] * 5, [4.0, 3.0, 2.8, 2.6, 2.5])
    return baseline, write_run(tmp_path / "tst", [4, 4, 1, 1, 1], [5.0, 4.5, 2.9, 2.5, 2.4])


def test_a_curve_is_read_back(tmp_path: Path):
    baseline, tst = map(read_curve, runs(tmp_path))
    assert (tst.switches, tst.bag_sizes, tst.num_steps) == ([20], [4, 1], 50)
    assert (baseline.data_tokens, tst.data_tokens) == (50 * 64, 20 * 64 * 4 + 30 * 64)
    assert tst.first_step_at(baseline.final_loss) == 40
    assert tst.first_step_at(2.0) is None


def test_table_verdict_and_picture(tmp_path: Path):
    picture = tmp_path / "curves.png"
    done = start("tools/compare_runs.py", *map(str, runs(tmp_path)), "--output", str(picture))
    assert done.returncode == 0, done.stderr
    for expected in ("2.5000", "2.4000", "3.2k", "7.04k", "4 then 1", "0.1000 nats below", "step 40 of 50", "1.25 x"):
        assert expected in done.stdout, done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_any_number_of_runs_against_a_baseline(tmp_path: Path):
    """Runs of 30 and 40 steps, each with its own decay: the shorter one does not get there."""
    names = [*map(str, runs(tmp_path))]
    names.append(str(write_run(tmp_path / "tst-80", [4, 1, 1, 1], [5.0, 2.9, 2.6, 2.45])))
    names.append(str(write_run(tmp_path / "tst-60", [4, 1, 1], [5.0, 2.9, 2.55])))
    files = ["--output", str(tmp_path / "c.svg"), "--report", str(tmp_path / "report.md")]
    done = start("tools/compare_runs.py", *names, *files, "--axes", "steps", "data_tokens", "hours", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert "at least 1.25 x and less than 1.67 x" in done.stdout
    report = (tmp_path / "report.md").read_text()
    assert "| final next-token loss (nats) | 2.5000 | 2.4000 | 2.4500 | 2.5500 |" in report
    # 40 steps of a tenth of a second.
    assert "| hours of training | 0.00139 | 0.00139 | 0.00111 | 0.000833 |" in report
    assert "<svg" in (tmp_path / "c.svg").read_text()


def test_runs_that_all_end_above_show_no_speed_up(tmp_path: Path):
    baseline, tst = runs(tmp_path)
    assert speed_up_at_equal_loss(compare(read_curve(tst), [read_curve(baseline)])) is None
    assert speed_up_at_equal_loss(compare(read_curve(baseline), [read_curve(tst)])) == (1.0, None)


def test_a_run_that_does_not_get_there_is_told_so(tmp_path: Path):
    done = start("tools/compare_runs.py", *map(str, reversed(runs(tmp_path))), "--output", str(tmp_path / "c.png"))
    assert "0.1000 nats above" in done.stdout
    assert "does not reach tst's final loss" in done.stdout


def test_a_missing_run_is_one_line(tmp_path: Path):
    done = start("tools/compare_runs.py", str(tmp_path / "a"), str(tmp_path / "b"))
    assert done.returncode == 2
    assert done.stderr.startswith("compare_runs.py: error: ") and done.stderr.count("\n") == 1
