"""Runs the parts of tests/gpu one after another, each under its time limit, and reports them as Markdown.

python -m tests.gpu.report [REPORT]; tests/gpu/run.sh calls it. It needs the standard library alone: what a part lacks,
the part says.
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
SHOWN_LINES = 60  # of a failed part's output


@dataclass(frozen=True)
class Part:
    """One file of tests.

    Attributes:
        title: what it looks at.
        path: the file.
        limit_s: after this many seconds it is ended and has failed.
    """

    title: str
    path: Path
    limit_s: float


# Together below ten minutes, with time left to install wheels.
PARTS = (
    Part("The device, its generators, collectives at one rank", Path("tests/gpu/test_device.py"), 90),
    Part("Embedding, attention and native loss", Path("tests/gpu/test_kernels.py"), 90),
    Part("Transformer Engine's cross-entropy kernels", Path("tests/gpu/test_te_kernels.py"), 120),
    Part("Runs from the command line", Path("tests/gpu/test_runs.py"), 240),
)


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        part: which.
        seconds: how long it took.
        tests: the lines that tests/gpu/results.py wrote.
        trouble: why the part failed as a whole, or nothing.
        output: what it printed.
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
    """Run a part; one that reaches its limit is ended, with everything it started."""
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
        f"Device: {', '.join(devices) or 'not found out'}. "
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
    """Run all parts, whatever becomes of each, and report them; 1 if one failed."""
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
