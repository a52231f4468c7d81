"""Tables, pictures and reports of made-up runs, as a user asks for them."""

from pathlib import Path

import pytest

from tests.telemetry.finished import write_run
from tests.training.runs import start


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    baseline = write_run(tmp_path / "baseline", [4.0, 3.0, 2.8, 2.6, 2.5])
    return [str(baseline), str(write_run(tmp_path / "tst", [5.0, 4.5, 2.9, 2.5, 2.4], bag_size=4, superposed=2))]


def test_table_verdict_and_picture(runs, tmp_path: Path):
    picture = tmp_path / "curves.png"
    done = start("tools/compare_runs.py", *runs, "--output", str(picture), COLUMNS="140")
    assert done.returncode == 0, done.stderr
    for expected in (
        "2.5000", "2.4000", "3.2k", "7.04k", "4 then 1", "ends 0.1000 nats below baseline",
        "would in 110 steps", "not known from runs of one length", "rose by 0.25 nats and was back after 7 steps",
        str(picture),
    ):  # fmt: skip
        assert expected in done.stdout, done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_any_number_of_runs_against_a_baseline(runs, tmp_path: Path):
    """Two lengths and two seeds: the shorter runs do not get to the baseline's 2.5, the longer ones do."""
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
    # 2.5 lies three sevenths of the way from 2.65, the mean of the shorter runs, to 2.3.
    ratio = 50 / (50 * 2 ** (3 / 7))
    assert f"speed-up of tst over baseline is {ratio:.2f} x at the 2.5000 nats of baseline" in report
    assert "![loss curves](c.svg)" in report
    assert "<svg" in (tmp_path / "c.svg").read_text()


def test_a_format_that_is_no_picture_is_refused(runs, tmp_path: Path):
    done = start("tools/compare_runs.py", *runs, "--output", str(tmp_path / "c.doc"))
    assert (done.returncode, done.stderr) == (
        2, f"compare_runs.py: error: --output {tmp_path / 'c.doc'}: must end in .png or .svg\n"
    )  # fmt: skip


def test_a_report_that_cannot_be_written_is_refused_before_the_work(runs, tmp_path: Path):
    done = start("tools/compare_runs.py", *runs, "--output", str(tmp_path / "c.png"), "--report", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"compare_runs.py: error: --report {tmp_path}: is a folder; name a file\n"


def test_a_missing_run_is_one_line(tmp_path: Path):
    done = start("tools/compare_runs.py", str(tmp_path / "a"), str(tmp_path / "b"))
    assert done.returncode == 2
    assert done.stderr.startswith("compare_runs.py: error: ") and done.stderr.count("\n") == 1
