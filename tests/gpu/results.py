"""A pytest plugin: each test's outcome as a line of JSON, written at once, so that a time limit loses none.

python -m pytest -p tests.gpu.results writes to the file that TST_GPU_RESULTS names.
"""

import json
import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append the outcome of a test, once: of its call, or of what kept it from being called."""
    if report.when != "call" and report.passed:
        return
    reason = ""
    if report.skipped:
        reason = report.longrepr[-1].removeprefix("Skipped: ")
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else str(report.longrepr)
    line = {
        "test": report.nodeid.rpartition("::")[2],
        "outcome": report.outcome,
        "seconds": report.duration,
        "reason": reason.strip().splitlines()[0] if reason.strip() else "",
        "figures": dict(report.user_properties),
    }
    with Path(os.environ["TST_GPU_RESULTS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
