#!/usr/bin/env python3
"""Test a finding of the paper at the quickstart's scale: train the runs that it needs, draw them and judge its claims.

    python examples/fidelity/run.py order                  trains missing runs; writes a table, a plot and a verdict
    python examples/fidelity/run.py order --seeds 1 2 3 4 5 --workers 4      more seeds, more concurrent runs
    python examples/fidelity/run.py order --plan           only lists the runs and whether they have finished
    STEPS=40 python examples/fidelity/run.py order         tests the program itself

The same command continues a finding that was stopped, and findings share their common runs. Runs are written to
runs/fidelity/runs, results to runs/fidelity/FINDING. All other flags are those of pretrain_tst.py, for all runs.
"""

import argparse
import csv
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tst.analysis.claims import Below, Claim, Optimum, Same, by_setting
from megatron_tst.analysis.sweep_results import read_result
from megatron_tst.config import EXIT_CODE, UserError, read_config

ROOT = Path(__file__).parents[2]
SETTINGS = ("--config", "examples/quickstart/config.yaml", "--data-cache-path", "data/quickstart/index_cache")


@dataclass(frozen=True)
class Study:
    """A finding and the grid that tests it.

    Attributes:
        title: title of the finding.
        grid: flags of tools/sweep.py.
        claims: claims that are tested.
    """

    title: str
    grid: str
    claims: tuple[Claim, ...]


BASE, ONE = "--bag-sizes 4 --step-ratios 0.3", "s4-r0.3"
STUDIES = {
    "order": Study(
        "superposing at both ends, at one end, not at all",
        f"{BASE} --vary tst-superpose both input output",
        (
            Below("both ends below input only", ONE, f"{ONE}-superpose_input"),
            Below("both ends below output only", ONE, f"{ONE}-superpose_output"),
            Below("input only below the baseline", f"{ONE}-superpose_input", "baseline"),
            Below("output only below the baseline", f"{ONE}-superpose_output", "baseline"),
        ),
    ),
    "bag-size": Study(
        "a U shape over the bag size s",
        "--bag-sizes 2 3 4 6 8 12 --step-ratios 0.3",
        (
            Optimum(
                "a bag size of 3 to 8 below both 2 and 12",
                tuple(f"s{size}-r0.3" for size in (3, 4, 6, 8)),
                ("s2-r0.3", "s12-r0.3"),
            ),
        ),
    ),
    "step-ratio": Study(
        "the best step ratio r is between 0.2 and 0.4",
        "--bag-sizes 4 --step-ratios 0.1 0.2 0.3 0.4 0.5 0.7 0.9",
        (
            Optimum(
                "a step ratio of 0.2 to 0.4 below all smaller and larger ones",
                tuple(f"s4-r{ratio}" for ratio in (0.2, 0.3, 0.4)),
                tuple(f"s4-r{ratio}" for ratio in (0.1, 0.5, 0.7, 0.9)),
            ),
        ),
    ),
    "bag-weights": Study(
        "the five bag weights, with small and larger bags",
        "--bag-sizes 4 8 --step-ratios 0.3 --bag-weights uniform power_law exponential first_token mutual_information",
        (
            Below("uniform below power law for s = 4", ONE, f"{ONE}-power_law"),
            Below("power law below uniform for s = 8", "s8-r0.3-power_law", "s8-r0.3"),
            Below("mutual information below power law for s = 8", "s8-r0.3-mutual_information", "s8-r0.3-power_law"),
            Below("power law below the first token only for s = 8", "s8-r0.3-power_law", "s8-r0.3-first_token"),
        ),
    ),
    "objective": Study(
        "cross-entropy over the bag (MCE) and the bag's total probability (MCEAlt)",
        f"{BASE} --vary tst-objective mce mce_alt",
        (Same("MCE and MCEAlt end equally", ONE, f"{ONE}-objective_mce_alt"),),
    ),
    "reinitialize": Study(
        "the negative control: embedding and output layer re-initialized at the switch",
        f"{BASE} --vary tst-reinitialize-at-switch false true",
        (
            Below("kept weights below re-initialized weights", ONE, f"{ONE}-reinitialize_at_switch"),
            Below("the baseline below re-initialized weights", "baseline", f"{ONE}-reinitialize_at_switch"),
        ),
    ),
    "phases": Study(
        "bags that shrink in phases (8, 4, 2, then 1) against one size (4, then 1) for as many steps",
        "--phases 8:0.1,4:0.1,2:0.1 4:0.3",
        (Below("shrinking bags below one size", "s8-r0.1-s4-r0.1-s2-r0.1", ONE),),
    ),
}


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read this program's flags; all other flags are those of pretrain_tst.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("finding", choices=STUDIES)
    parser.add_argument("--plan", action="store_true", help="only list the runs and whether they have finished")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/fidelity"), help="relative to the repository's folder"
    )
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--workers", default="2", help="number of concurrent runs")
    return parser.parse_known_args()


def main(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    """Train, draw and judge one finding; return the exit code."""
    flags = [*SETTINGS, *flags]
    text = read_config(flags).data.data_path[-1]
    if not Path(f"{text}.idx").is_file():
        raise UserError(f"--data-path {text}: does not exist; bash examples/quickstart/run.sh prepares it")
    study, runs, results = STUDIES[arguments.finding], arguments.output / "runs", arguments.output / arguments.finding
    steps = ["--steps", os.environ["STEPS"]] if "STEPS" in os.environ else []
    own = [
        "--output",
        str(runs),
        "--results",
        str(results),
        "--seeds",
        *arguments.seeds,
        "--workers",
        arguments.workers,
    ]
    if arguments.plan:
        return sweep([*own, "--plan", *study.grid.split(), *steps, *flags])
    code = sweep([*own, *study.grid.split(), *steps, *flags])
    if code != EXIT_CODE and (results / "sweep.csv").is_file():
        print(judge(study, runs, results))
    return code


def sweep(argv: Sequence[str]) -> int:
    """Run tools/sweep.py; if this program is asked to stop, the sweep is asked too, and its runs save checkpoints."""
    # A session of its own keeps the terminal's signals, such as Ctrl-C, away from the sweep.
    with subprocess.Popen([sys.executable, "tools/sweep.py", *argv], start_new_session=True) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            return process.wait()


def judge(study: Study, runs: Path, results: Path) -> str:
    """Write verdict.md with the verdict on each claim and the means; return the verdicts."""
    with (results / "sweep.csv").open(encoding="utf-8") as file:
        ended = by_setting([read_result(runs / row["run"]) for row in csv.DictReader(file)])
    findings = [(claim.text, claim.judge(ended)) for claim in study.claims]
    told = "\n".join(f"- {text}: **{found.verdict}** ({found.evidence})" for text, found in findings)
    with (results / "sweep_means.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
    # Take the newest plot: an earlier call with fewer runs may have drawn another kind.
    picture = max(results.glob("*.png"), key=lambda path: path.stat().st_mtime)
    text = f"# {study.title}\n\n{told}\n\n{table}\n\n![final losses]({picture.name})\n"
    (results / "verdict.md").write_text(text, encoding="utf-8")
    return told


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.chdir(ROOT)
    try:
        sys.exit(main(*parse_arguments()))
    except UserError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
