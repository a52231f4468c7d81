"""A pytest plugin that writes each test's outcome immediately as a line of JSON, so that a time limit loses none.

python -m pytest -p tests.gpu.results writes to the file in the variable TST_GPU_RESULTS.
"""

import json
import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append the outcome of a test once: that of its call, or that of the set-up that prevented the call."""
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
