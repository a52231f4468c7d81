"""launch/requeue.sh by itself, with a scontrol that only records its arguments."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.training.runs import ROOT

TRACKER = "latest_checkpointed_iteration.txt"


class Job:
    """A job whose run has ended; each call of the script follows one start of the job."""

    def __init__(self, folder: Path) -> None:
        self.run, self.asked = folder / "run", folder / "asked"
        (self.run / "checkpoints").mkdir(parents=True)
        scontrol = folder / "bin" / "scontrol"
        scontrol.parent.mkdir()
        scontrol.write_text(f'#!/bin/sh\necho "$*" >>"{self.asked}"\n')
        scontrol.chmod(0o755)
        self.environment = {
            **os.environ, "PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "77",
            "RUN_DIR": str(self.run), "MAX_RESTARTS": "2",
        }  # fmt: skip

    def save(self, text: str | bytes, folder: Path | None = None) -> None:
        tracker = (folder or self.run / "checkpoints") / TRACKER
        tracker.write_bytes(text if isinstance(text, bytes) else text.encode())

    def ends(self, code: str = "75", complaint: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Call the script with an exit code; bash itself must print nothing but the expected complaint."""
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "requeue.sh"), code], env={**self.environment, **environment},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert complaint in done.stderr and bool(complaint) == bool(done.stderr)
        return done

    @property
    def requeues(self) -> int:
        return self.asked.read_text().count("requeue 77\n") if self.asked.exists() else 0

    def count_starts(self, most: int = 10) -> int:
        """End repeatedly without progress; return how often the job is started again."""
        before = self.requeues
        for _ in range(most):
            if self.ends().returncode != 0:
                return self.requeues - before
        return most


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize(
    ("code", "word"),
    [("0", "the run is complete"), ("2", "not started again: exit code 2"), ("3", "not started again: exit code 3")],
)
def test_completed_or_failed_job_is_not_started_again(job, code, word):
    done = job.ends(code)
    assert (done.returncode, job.requeues) == (int(code), 0)
    assert word in done.stdout


def test_job_that_makes_progress_is_started_again(job):
    for step in range(10, 100, 10):
        job.save(f"{step}\n")
        assert job.ends().returncode == 0
    assert job.requeues == 9
    assert "at step 90: starting again" in job.ends().stdout


# Contents of a tracker that does not change: a step, nothing, and content that our programs never write.
TRACKERS = {
    "none": None, "a step": b"40", "a step with zeros": b"0000008", "empty": b"", "blank": b" \n\n",
    "a word": b"release", "bytes": b"\xff\x00\x01", "negative": b"-3", "a fraction": b"1.5", "two": b"1 2",
    "huge": b"9" * 40,
}  # fmt: skip


@pytest.mark.parametrize("tracker", TRACKERS)
def test_job_without_progress_is_given_up(job, tracker):
    if (text := TRACKERS[tracker]) is not None:
        job.save(text)
    assert job.count_starts() == 2
    done = job.ends()
    assert "no progress (MAX_RESTARTS)" in done.stdout and done.returncode == 75
    # Control: a checkpoint is progress, whatever the tracker contained before.
    job.save("50")
    assert job.ends().returncode == 0


def test_unreadable_tracker_is_no_progress(job):
    (job.run / "checkpoints" / TRACKER).mkdir()
    assert job.count_starts() == 2


def test_count_restarts_at_a_step_that_was_reset_by_hand(job):
    for step in ("36", "16", "20"):
        job.save(step)
        assert job.ends().returncode == 0
    assert job.count_starts() == 1


RESTARTS = {
    "empty": b"", "blank": b"\n", "words": b"77 many starts\n", "one number": b"77", "two numbers": b"40 2\n",
    "bytes": b"\x00\xff\x00", "zeros": b"77 040 00\n",
}  # fmt: skip


@pytest.mark.parametrize("restarts", RESTARTS)
def test_invalid_count_is_replaced(job, restarts):
    job.save("40")
    (job.run / "restarts").write_bytes(RESTARTS[restarts])
    assert job.count_starts() == 2


def test_job_that_is_submitted_again_has_its_own_count(job):
    job.save("40")
    assert job.count_starts() == 2
    assert job.ends(SLURM_JOB_ID="78").returncode == 0


def test_job_is_not_started_again_if_starts_cannot_be_counted(job):
    (job.run / "restarts").mkdir()
    done = job.ends(complaint="cannot overwrite directory")
    assert done.returncode == 75 and "restarts cannot be written" in done.stdout
    assert job.requeues == 0


@pytest.mark.parametrize("most", ["", "five", "-1", "2.5"])
def test_limit_that_is_not_a_number_is_named(job, most):
    done = job.ends(MAX_RESTARTS=most)
    assert done.returncode == 75 and f"MAX_RESTARTS '{most}' is not a whole number" in done.stdout


def test_exit_code_that_is_not_a_number_shows_the_usage(job):
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "requeue.sh"), "high"], env=job.environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "launch/requeue.sh CODE" in done.stderr


def test_progress_is_read_through_a_link_to_the_checkpoints(job, tmp_path: Path):
    """With --save, the run directory has a link to the checkpoints."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (job.run / "checkpoints").rmdir()
    (job.run / "checkpoints").symlink_to(elsewhere)
    for step in range(10, 60, 10):
        job.save(str(step), elsewhere)
        assert job.ends().returncode == 0
    assert job.count_starts() == 1
    elsewhere.rename(tmp_path / "gone")
    done = job.ends()
    assert f"links to {elsewhere}, which does not exist on this node" in done.stdout and done.returncode == 75


def test_failure_of_scontrol_is_reported(job, tmp_path: Path):
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    done = job.ends()
    assert done.returncode == 75 and "scontrol could not requeue it" in done.stdout
