"""Two commits of a clone: one that computes the same as its parent, and one that does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import ROOT, arguments


def git(folder: Path, *command: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "-C", str(folder), *identity, *command], check=True, capture_output=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    folder = tmp_path_factory.mktemp("commits") / "clone"
    git(ROOT, "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(folder))
    program = folder / "pretrain_tst.py"
    program.write_text(program.read_text() + "\n# A comment computes nothing.\n")
    git(folder, "commit", "--quiet", "--all", "--message", "a comment")
    optimizer = folder / "megatron_tst" / "training" / "optimizer.py"
    source = optimizer.read_text()
    assert "adam_beta1=settings.adam_beta1," in source
    optimizer.write_text(source.replace("adam_beta1=settings.adam_beta1,", "adam_beta1=0.5 * settings.adam_beta1,"))
    git(folder, "commit", "--quiet", "--all", "--message", "half of a beta")
    return folder


@pytest.fixture
def compare(clone: Path, corpus: str, tokenizer, tmp_path: Path):
    flags = arguments(
        corpus, str(tokenizer.path), tmp_path / "unused", "--tst-bag-size 4 --tst-steps 2 --train-iters 4"
    )

    def run(*commits: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/compare_commits.py", *commits, *flags]
        return subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=900)

    return run


def test_commits_that_compute_the_same_are_equal(compare):
    done = compare("HEAD~2", "HEAD~1")
    assert done.returncode == 0, done.stderr
    assert "figures of HEAD~2 and HEAD~1 are bitwise equal" in done.stdout


def test_another_computation_is_shown_from_its_first_step_on(compare):
    done = compare("HEAD~1", "HEAD")
    assert done.returncode == 1, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    # The first update uses one gradient alone, so a beta shows from the third step on.
    assert rows[0][1] == "loss" and int(rows[0][0]) > 1
    assert "figures differ, with a relative difference of at most" in done.stdout


def test_an_unknown_commit_is_one_line(compare):
    done = compare("nowhere", "HEAD")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("compare_commits.py: error: nowhere: ")
