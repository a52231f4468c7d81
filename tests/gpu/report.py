"""Runs the parts of tests/gpu one after the other, each with a time limit, and reports them as Markdown.

tests/gpu/run.sh calls python -m tests.gpu.report [REPORT]. It needs only the standard library; each part reports the
packages that it is missing.
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHOWN_LINES = 60  # lines of a failed part's output


@dataclass(frozen=True)
class Part:
    """One file of tests.

    Attributes:
        title: title in the report.
        path: path of the file.
        limit_s: time limit in seconds, after which the part is killed and counts as failed.
    """

    title: str
    path: Path
    limit_s: float


# The limits add up to less than ten minutes and leave time to install wheels.
PARTS = (
    Part("The device, its generators, collectives at one rank", Path("tests/gpu/test_device.py"), 90),
    Part("Embedding, attention and native loss", Path("tests/gpu/test_kernels.py"), 90),
    Part("Transformer Engine's cross-entropy kernels", Path("tests/gpu/test_te_kernels.py"), 120),
    Part("Runs from the command line", Path("tests/gpu/test_runs.py"), 240),
)


@dataclass
class Outcome:
    """The outcome of a part.

    Attributes:
        part: the part.
        seconds: duration in seconds.
        tests: lines that tests/gpu/results.py wrote.
        trouble: why the part failed as a whole; empty if it did not.
        output: output of the part.
    """

    part: Part
    seconds: float
    tests: list[dict[str, Any]]
    trouble: str
    output: str

    @property
    def is_failed(self) -> bool:
        return bool(self.trouble) or any(test["outcome"] == "failed" for test in self.tests)

    @property
    def summary(self) -> str:
        outcomes = [test["outcome"] for test in self.tests]
        counts = [f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped") if kind in outcomes]
        return ", ".join([*counts, *filter(None, [self.trouble])])


def run_part(part: Part) -> Outcome:
    """Run a part; if it reaches its limit, kill it and all processes that it started."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results, output = Path(folder, "results"), Path(folder, "output")
        results.touch()
        command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.results", "-q", str(part.path)]
        environment = {**os.environ, "TST_GPU_RESULTS": str(results)}
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(part.limit_s)
                trouble = "" if code in (0, 1) else f"pytest ended with code {code}"
            except subprocess.TimeoutExpired:
                trouble = f"ended after its limit of {part.limit_s:g} s"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        tests = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
        printed = output.read_text("utf-8", "replace")
    return Outcome(part, time.monotonic() - started, tests, trouble or ("" if tests else "no test ran"), printed)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells)


def describe(test: dict[str, Any]) -> str:
    figures = [f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
               for name, value in test["figures"].items()]  # fmt: skip
    return "; ".join([*filter(None, [test["reason"]]), *figures])


def write_report(outcomes: list[Outcome]) -> str:
    """Return the report as Markdown."""
    is_failed = any(outcome.is_failed for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    devices = [
        test["figures"]["device"] for outcome in outcomes for test in outcome.tests if "device" in test["figures"]
    ]
    head = (
        f"**{'Failed' if is_failed else 'Passed'}** in {seconds:.0f} s. "
        f"Device: {', '.join(devices) or 'unknown'}. "
        f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC."
    )
    rows = [
        (outcome.part.title, f"{outcome.seconds:.0f}", "**failed**" if outcome.is_failed else "", outcome.summary)
        for outcome in outcomes
    ]
    pieces = ["# A GPU's first minutes", head, table(("part", "s", "", "tests"), rows)]
    for outcome in outcomes:
        rows = [(test["test"], test["outcome"], f"{test['seconds']:.1f}", describe(test)) for test in outcome.tests]
        pieces.append(f"## {outcome.part.title}")
        if rows:
            pieces.append(table(("test", "outcome", "s", ""), rows))
        if outcome.is_failed:
            shown = "\n".join(outcome.output.splitlines()[-SHOWN_LINES:])
            pieces.append(f"The end of its output:\n\n```\n{shown}\n```")
    return "\n\n".join(pieces) + "\n"


def main(parts: tuple[Part, ...], path: Path | None) -> int:
    """Run all parts even if some fail, and report them; return 1 if a part failed."""
    outcomes = []
    for part in parts:
        outcomes.append(run_part(part))
        print(f"{part.title}: {outcomes[-1].summary}", file=sys.stderr, flush=True)
    report = write_report(outcomes)
    print(report, end="")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report, encoding="utf-8")
    return int(any(outcome.is_failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(PARTS, Path(sys.argv[1]) if sys.argv[1:] else None))
