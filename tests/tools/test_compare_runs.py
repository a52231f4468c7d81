"""Tables, plots and reports of synthetic runs, from the command line."""

from pathlib import Path

import pytest

from tests.telemetry.finished import write_run
from tests.training.runs import start


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    baseline = write_run(tmp_path / "baseline", [4.0, 3.0, 2.8, 2.6, 2.5])
    return [str(baseline), str(write_run(tmp_path / "tst", [5.0, 4.5, 2.9, 2.5, 2.4], bag_size=4, superposed=2))]


def test_the_tool_prints_table_and_verdict_and_draws_a_plot(runs, tmp_path: Path):
    picture = tmp_path / "curves.png"
    done = start("tools/compare_runs.py", *runs, "--output", str(picture), COLUMNS="140")
    assert done.returncode == 0, done.stderr
    for expected in (
        "2.5000", "2.4000", "3.2k", "7.04k", "4 then 1", "ends 0.1000 nats below baseline",
        "would in 110 steps", "not known from runs of one length", "rose by 0.25 nats and recovered after 7 steps",
        str(picture),
    ):  # fmt: skip
        assert expected in done.stdout, done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_several_lengths_and_seeds_are_compared_with_a_baseline(runs, tmp_path: Path):
    """Two lengths and two seeds: the longer runs reach the baseline's 2.5, the shorter ones do not."""
    runs = runs[:1]
    for steps, ends in ((50, (2.6, 2.7)), (100, (2.3, 2.3))):
        for seed, end in enumerate(ends, start=1):
            losses = [5.0] * (steps // 10 - 1) + [end]
            runs.append(str(write_run(tmp_path / f"tst{steps}-seed{seed}", losses, 4, steps * 4 // 100, seed)))
    files = ["--output", str(tmp_path / "c.svg"), "--report", str(tmp_path / "reports.md")]
    done = start("tools/compare_runs.py", *runs, *files, "--axes", "steps", "flops", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "reports.md").read_text()
    assert "| tst50 | 2 | 4 then 1 | 50 | 5e+09 | 7.04k | 1.25 | 2.6500 ± 0.0500 |" in report
    # 2.5 is three sevenths of the way from 2.65, the mean of the shorter runs, to 2.3.
    ratio = 50 / (50 * 2 ** (3 / 7))
    assert f"speed-up of tst over baseline is {ratio:.2f} x at the 2.5000 nats of baseline" in report
    assert "![loss curves](c.svg)" in report
    assert "<svg" in (tmp_path / "c.svg").read_text()


def test_an_unknown_plot_format_is_refused(runs, tmp_path: Path):
    done = start("tools/compare_runs.py", *runs, "--output", str(tmp_path / "c.doc"))
    assert (done.returncode, done.stderr) == (
        2, f"compare_runs.py: error: --output {tmp_path / 'c.doc'}: must end in .png or .svg\n"
    )  # fmt: skip


def test_an_unwritable_report_is_refused_before_any_work(runs, tmp_path: Path):
    done = start("tools/compare_runs.py", *runs, "--output", str(tmp_path / "c.png"), "--report", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"compare_runs.py: error: --report {tmp_path}: is a folder; name a file\n"


def test_a_missing_run_is_reported_in_one_line(tmp_path: Path):
    done = start("tools/compare_runs.py", str(tmp_path / "a"), str(tmp_path / "b"))
    assert done.returncode == 2
    assert done.stderr.startswith("compare_runs.py: error: ") and done.stderr.count("\n") == 1
