"""The job scripts under a real SLURM: two nodes that train on the CPU, and eight nodes that only check requests."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_tst.telemetry import read_metrics
from tests.launch.cluster import Cluster, running_cluster, why_not
from tests.training.runs import ROOT

pytestmark = pytest.mark.slurm

SCRIPTS = sorted(path for path in (ROOT / "launch").glob("*.sh") if "#SBATCH" in path.read_text())
# Options for launch/moe_10b_tst.sh on nodes without GPUs, with one rank each and experts over both.
SMALL_NODES = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --time=30".split()
SMALL_MODEL = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 2 --kv-channels 8 "
    "--seq-length 16 --vocab-size 300 --num-experts 4 --moe-ffn-hidden-size 24 --moe-router-topk 2 "
    "--expert-model-parallel-size 2 --no-moe-grouped-gemm "
    "--tst-bag-size 4 --tst-steps 20 --lr 1e-2 --lr-warmup-iters 2 --lr-wsd-decay-iters 10 --micro-batch-size 2 "
    "--global-batch-size 4 --split 90,10,0 --eval-iters 2 --eval-interval 25 --log-interval 1 --num-workers 1 "
    "--save-interval 10"
).split()


FINAL = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
TIMEOUT_S = 900
# The moments at which ranks can be held: the call's number, and the steps after which the run may then stop. A save is
# finished in the background of later steps.
HELD = {
    "an index": (1, [0]),
    "a step": (13, [13]),
    "an evaluation": (1, [25]),
    "a save": (1, range(20, 40)),
}


@pytest.fixture(scope="module", autouse=True)
def slurm():
    if (reason := why_not()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster():
    with running_cluster(2) as cluster:
        yield cluster


class Jobs:
    """Submits launch/moe_10b_tst.sh and follows its jobs."""

    def __init__(self, cluster: Cluster, runs: Path, environment: dict[str, str]) -> None:
        self.cluster, self.runs, self.environment = cluster, runs, environment

    def submit(self, name: str, *flags: str, **environment: str) -> str:
        done = self.cluster.call(
            "sbatch", "--parsable", f"--job-name={name}", f"--output={self.runs}/{name}.log", *SMALL_NODES,
            "launch/moe_10b_tst.sh", *SMALL_MODEL, *flags, cwd=ROOT, env={**self.environment, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def wait(self, what, job: str, name: str) -> None:
        """Return when a condition holds; fail with the logs if the job ends without it or takes too long."""
        deadline_s = time.monotonic() + TIMEOUT_S
        is_over = False
        while not is_over and time.monotonic() < deadline_s:
            # The state is read before the condition, so that everything a job does before its end is seen.
            is_over = self.state(job) in FINAL
            if what():
                return
            self.cluster.pause()
        raise AssertionError(f"{self.state(job)}\n{self.logs(name)}")

    def end(self, job: str, name: str) -> str:
        """Return a job's final state; before it, the job is COMPLETING for a while and may start again."""
        self.wait(lambda: self.state(job) in FINAL, job, name)
        return self.state(job)

    def state(self, job: str) -> str:
        shown = self.cluster.call("scontrol", "show", "job", job).stdout
        return shown.partition("JobState=")[2].split()[0] if "JobState=" in shown else "GONE"

    def logs(self, name: str) -> str:
        files = [self.runs / f"{name}.log", *sorted((self.runs / name / "logs").glob("*.log"))]
        return "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in files if file.exists())

    def steps(self, name: str) -> list[dict]:
        metrics = self.runs / name / "metrics.jsonl"
        return [line for line in read_metrics(metrics) if "loss" in line] if metrics.exists() else []

    def finish(self, name: str, job: str) -> None:
        assert self.end(job, name) == "COMPLETED", self.logs(name)
        assert "the run is complete" in self.batch_log(name)

    def batch_log(self, name: str) -> str:
        log = self.runs / f"{name}.log"
        return log.read_text() if log.exists() else ""


@pytest.fixture
def jobs(cluster, corpus, tokenizer, tmp_path: Path):
    environment = {
        "MOE_DATA_PATH": f"0.5 {corpus} 0.5 {corpus}", "QWEN_TOKENIZER": str(tokenizer.path),
        "RUNS_DIR": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MAX_RESTARTS": "2",
    }  # fmt: skip
    return Jobs(cluster, tmp_path, environment)


def curve(lines: list[dict]) -> list[tuple]:
    return [(line["step"], line["bag_size"], line["loss"], line["grad_norm"]) for line in lines]


def held_python(folder: Path, moments: list[str]) -> str:
    """Write an interpreter that holds ranks at a moment of each start but the last; each has its own directory."""
    python, lines = folder / "python", ["#!/bin/sh"]
    for start, moment in enumerate(moments):
        (folder / f"start {start}").mkdir()
        held = f'{sys.executable} -m tests.training.held "{folder}/start {start}" "{moment}:{HELD[moment][0]}" "$@"'
        lines.append(f'[ "${{SLURM_RESTART_COUNT:-0}}" = {start} ] && exec {held}')
    python.write_text("\n".join([*lines, f'exec {sys.executable} "$@"', ""]))
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize("moments", [["a step", "a save"], pytest.param(list(HELD), marks=pytest.mark.long)])
def test_job_that_receives_signals_ends_like_an_undisturbed_one(jobs, moments):
    calm = jobs.submit("calm", "--train-iters", "60")
    jobs.finish("calm", calm)
    job = jobs.submit("harried", "--train-iters", "60", PYTHON=held_python(jobs.runs, moments))
    for start in range(len(moments)):
        jobs.wait((jobs.runs / f"start {start}" / "here").exists, job, "harried")
        for signal in ("USR1", "TERM"):
            assert jobs.cluster.call("scancel", f"--signal={signal}", job).returncode == 0
        (jobs.runs / f"start {start}" / "go_on").touch()
    jobs.finish("harried", job)
    log = jobs.batch_log("harried")
    stops = [int(step) for step in re.findall(r"stopped with exit code 75 at step (\d+): starting again", log)]
    assert len(stops) == len(moments) and log.count("the run is complete") == 1
    assert all(step in HELD[moment][1] for step, moment in zip(stops, moments, strict=True)), log
    assert jobs.cluster.call("scontrol", "show", "job", job).stdout.count(f"Restarts={len(moments)}") == 1
    assert [line["bag_size"] for line in jobs.steps("harried")] == [4] * 20 + [1] * 40
    assert curve(jobs.steps("harried")) == curve(jobs.steps("calm"))
    # There is one log file per node, to which further starts append.
    first, second = ((jobs.runs / "harried" / "logs" / f"n{node}.log").read_text() for node in (1, 2))
    assert "preflight: 2 nodes, 2 ranks" in first and "loaded" in first
    assert first.count("before the first step; start the same command again") == moments.count("an index")
    assert first.count("; continue with --load") == len(moments) - moments.count("an index")
    assert "[rank" not in first + second
    # The shipped configuration enables overlap for MoE models.
    settings = yaml.safe_load((jobs.runs / "harried" / "config.yaml").read_text())
    assert settings["parallel"]["overlap_grad_reduce"] and settings["parallel"]["overlap_param_gather"]
    assert settings["optimizer"]["use_distributed_optimizer"]


def test_job_that_makes_no_progress_is_given_up(jobs):
    """Each start fails before its first checkpoint, because the ranks' interpreter is a program that exits with 1."""
    job = jobs.submit("doomed", "--train-iters", "60", PYTHON="/bin/false")
    assert jobs.end(job, "doomed") == "FAILED"
    assert "made no progress" in jobs.batch_log("doomed")
    assert jobs.batch_log("doomed").count("starting again") == 2


def test_job_with_a_wrong_setting_is_not_started_again(jobs):
    job = jobs.submit("mistaken", "--train-iters", "60", "--split", "0,0,0")
    assert jobs.end(job, "mistaken") == "FAILED"
    assert "not started again: exit code 2" in jobs.batch_log("mistaken")
    assert "--split 0,0,0" in jobs.logs("mistaken")


def test_preflight_only_checks_the_nodes_and_exits(jobs):
    job = jobs.submit("looking", "--train-iters", "60", "--preflight-only")
    jobs.finish("looking", job)
    assert "preflight: all-reduce between nodes" in jobs.logs("looking")
    assert not jobs.steps("looking")


def test_every_script_fits_the_published_cluster(jobs):
    """sbatch --test-only checks each script's requests against eight nodes of eight GPUs."""
    jobs.cluster.stop()
    with running_cluster(8, gpus=8, cpus=112) as published:
        for script in SCRIPTS:
            done = published.call("sbatch", "--test-only", str(script.relative_to(ROOT)), cwd=ROOT)
            assert done.returncode == 0, f"{script.name}: {done.stderr}"
            assert "using" in done.stderr
        too_many = published.call("sbatch", "--test-only", "--nodes=9", str(SCRIPTS[0]), cwd=ROOT)
        assert too_many.returncode != 0


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_no_problems(script: Path):
    done = subprocess.run(["shellcheck", "-x", str(script.relative_to(ROOT))], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
