"""The report of tests/gpu for parts that pass, fail, skip, crash or hang, and the arguments that run.sh passes."""

import contextlib
import os
import select
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.gpu.report import PARTS, ROOT, Part, main

FILES = {
    "fine": """
def test_good(record_property):
    record_property("error", 0.00012345)
    record_property("device", "a card")
""",
    "broken": """
def test_bad():
    assert 1 == 2, "one | two"
def test_good():
    pass
""",
    "lacking": """
import pytest
def test_absent():
    pytest.skip("needs a CUDA device")
""",
    "dying": """
import os
def test_good():
    pass
def test_death():
    os._exit(9)
""",
    "hanging": """
import pathlib, subprocess, sys, threading
def test_wait():
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    pathlib.Path(__file__).with_name("child").write_text(str(child.pid))
    threading.Event().wait()
""",
}


@pytest.fixture
def parts(tmp_path: Path):
    """Return a function that creates parts from the named fake files; the hanging one has a short limit."""

    def make(*names: str) -> tuple[Part, ...]:
        for name in names:
            (tmp_path / f"test_{name}.py").write_text(FILES.get(name, ""))
        limits = {"hanging": 20}
        return tuple(Part(name, tmp_path / f"test_{name}.py", limits.get(name, 120)) for name in names)

    return make


def row(report: str, start: str) -> list[str]:
    """Return the cells of the first row whose first cell is ``start``."""
    line = next(line for line in report.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_parts_that_pass_or_skip_do_not_fail(parts, tmp_path, capsys):
    assert main(parts("fine", "lacking"), tmp_path / "folder/report.md") == 0
    report = (tmp_path / "folder/report.md").read_text()
    assert capsys.readouterr().out == report
    assert "**Passed**" in report and "Device: a card." in report
    assert row(report, "fine")[2:] == ["", "1 passed"]
    assert row(report, "test_good")[1::2] == ["passed", "error 0.000123; device a card"]
    assert row(report, "lacking")[2:] == ["", "1 skipped"]
    assert row(report, "test_absent")[1::2] == ["skipped", "needs a CUDA device"]


def test_the_other_parts_run_after_a_failure(parts, tmp_path, capsys):
    assert main(parts("broken", "dying", "empty", "hanging", "lacking"), None) == 1
    report = capsys.readouterr().out
    assert "**Failed**" in report and "Device: unknown." in report
    assert row(report, "broken")[2:] == ["**failed**", "1 passed, 1 failed"]
    assert row(report, "test_bad")[3] == r"AssertionError: one \| two"
    assert "AssertionError: one | two" in report.partition("The end of its output")[2]
    # Outcomes of tests before a crash are kept.
    assert row(report, "dying")[2:] == ["**failed**", "1 passed, pytest ended with code 9"]
    assert row(report, "empty")[2:] == ["**failed**", "pytest ended with code 5"]
    assert row(report, "hanging")[2:] == ["**failed**", "ended after its limit of 20 s"]
    assert row(report, "lacking")[2:] == ["", "1 skipped"]
    # Child processes of the hanging part are killed too.
    with contextlib.suppress(ProcessLookupError):
        child = os.pidfd_open(int((tmp_path / "child").read_text()))
        assert select.select([child], [], [], 60)[0]


def test_all_time_limits_add_up_to_less_than_ten_minutes():
    assert sum(part.limit_s for part in PARTS) <= 540
    files = {path.relative_to(ROOT) for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert {part.path for part in PARTS} == files - {Path("tests/gpu/test_report.py")}


def test_wheels_are_unpacked_for_the_parts(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, member in (("tiny-1.0", "tiny.py"), ("transformer_engine-2.20.2", "transformer_engine/part.py")):
        with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, "")
    # This script stands in for the interpreter that would run the parts, and prints its arguments.
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[ "$2" = zipfile ] && exec {sys.executable} "$@"\necho "$@"\n'
        'cd "${PYTHONPATH%%:*}" && ls -d *.py transformer_engine* "$TST_TE_WHEELS"/2.20.2/*/part.py\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "TST_WHEELS": "wheels"}
    command = ["bash", str(ROOT / "tests/gpu/run.sh"), "report.md"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    said = done.stdout.splitlines()
    assert said[0] == f"-m tests.gpu.report {tmp_path}/report.md", done.stderr
    assert said[1].endswith("/transformer_engine_wheels/2.20.2/transformer_engine/part.py")
    # Transformer Engine must not be importable, because without its compiled library it would count as installed.
    assert said[2:] == ["tiny.py", "transformer_engine_wheels"]
