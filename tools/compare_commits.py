#!/usr/bin/env python3
r"""Train the same short run at two commits, and compare the losses and gradient norms of all steps.

    python tools/compare_commits.py main HEAD --config examples/quickstart/config.yaml --train-iters 20
    ... --ranks 2 --tensor-model-parallel-size 2        on several ranks, under torchrun
    ... --stop-after 10                                 with a stop and a resumption after 10 steps

A commit is any name that git resolves; `.` is the working tree with its uncommitted changes. All other flags are those
of pretrain_tst.py. Both sides run one after the other with this interpreter and its packages. The exit code is 0 if all
figures are bitwise equal, and 1 if they differ.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_tst.analysis.same_steps import Step, differing, largest_difference, read_steps
from megatron_tst.config import EXIT_CODE, EXIT_RESUMABLE, UserError

ROOT = Path(__file__).parents[1]
# The first lines of the table show where two runs begin to differ; later lines only show how far.
SHOWN = 12


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read this program's flags; all other flags are those of pretrain_tst.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("commits", nargs=2, metavar="COMMIT", help="commits to compare; `.` is the working tree")
    parser.add_argument("--ranks", type=int, default=1, help="number of processes per run")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="stop each run after this step and resume it")
    return parser.parse_known_args()


def main(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    """Train both sides and print the comparison; return the exit code."""
    with tempfile.TemporaryDirectory() as name:
        sides = []
        for number, commit in enumerate(arguments.commits):
            run_dir = Path(name) / f"run{number}"
            with checked_out(commit, Path(name) / f"tree{number}") as tree:
                print(f"training at {commit}", flush=True)
                train(tree, run_dir, arguments, flags)
            sides.append(read_steps(run_dir / "metrics.jsonl"))
    different = differing(*sides)
    show(arguments.commits, *sides, different)
    return 1 if different else 0


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """Yield a folder with a commit's files, or the working tree.

    Raises:
        UserError: if git does not know the commit.
    """
    if commit == ".":
        yield ROOT
        return
    git = [shutil.which("git") or "git", "-C", str(ROOT), "worktree"]
    done = subprocess.run([*git, "add", "--detach", str(folder), commit], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{commit}: {done.stderr.strip().splitlines()[-1]}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def train(tree: Path, run_dir: Path, arguments: argparse.Namespace, flags: Sequence[str]) -> None:
    """Train one side with a metric line for every step; paths in the flags are relative to the current folder.

    Raises:
        UserError: if a run ends with an unexpected exit code.
    """
    program = [str(tree / "pretrain_tst.py"), *flags, "--log-interval", "1", "--tst-run-dir", str(run_dir)]
    if arguments.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
        program = [*launcher, *program]
    parts: list[tuple[list[str], int]] = [([], 0)]
    if arguments.stop_after is not None:
        load = ["--load", str(run_dir / "checkpoints")]
        parts = [(["--exit-interval", str(arguments.stop_after)], EXIT_RESUMABLE), (load, 0)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    for extra, wanted in parts:
        command = [sys.executable, *program, *extra]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
        # torchrun exits with 1 for every failure of a rank.
        if done.returncode != (wanted if arguments.ranks == 1 else bool(wanted)):
            raise UserError(f"{' '.join(command[1:])}: ended with {done.returncode}: {done.stderr.strip()[-2000:]}")


def show(commits: Sequence[str], one: Sequence[Step], other: Sequence[Step], different: Sequence[int]) -> None:
    """Print the first figures that differ, and how far both sides differ."""
    console = Console()
    if not different:
        told = f"{len(one)} figures of {commits[0]} and {commits[1]} are bitwise equal"
        console.print(told, highlight=False, soft_wrap=True)
        return
    table = Table("step", "figure", box=SIMPLE_HEAD, show_edge=False)
    for commit in commits:
        table.add_column(commit, justify="right")
    for place in different[:SHOWN]:
        values = [repr(side[place].value) if place < len(side) else "" for side in (one, other)]
        step = (one if place < len(one) else other)[place]
        table.add_row(str(step.step), step.name, *values)
    console.print(table)
    console.print(
        f"{len(different)} of {max(len(one), len(other))} figures differ, with a relative difference of at most "
        f"{largest_difference(one, other):.3g}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main(*parse_arguments()))
    except UserError as error:
        print(f"compare_commits.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
