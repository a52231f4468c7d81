"""A checkpoint that is saved under one layout resumes under another; and ranks stop together."""

import os
import signal
from pathlib import Path

import pytest

from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.training.metrics_logger import MetricsLogger
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import train_layout
from tests.distributed.test_layouts import DENSE, MOE, setup  # noqa: F401
from tests.distributed.test_overlap import OVERLAPS, SINGLE

pytestmark = pytest.mark.distributed

TP2, PP2, EP2 = (f"--{kind}-model-parallel-size 2" for kind in ("tensor", "pipeline", "expert"))
SHARDED = "--use-distributed-optimizer"
OVERLAPPED = OVERLAPS["gather"]
INTERLEAVED = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
# Layouts pad the vocabulary differently: 300 tokens are 384 columns on one rank and 512 on two.
PADDED = "--make-vocab-size-divisible-by 128"

# kind: (model, ranks and flags that save, {name: ranks and flags that load})
KINDS = {
    "plain": (
        DENSE,
        (2, TP2),
        {"one rank": (1, ""), "pp2": (2, PP2), "pp2 interleaved": (2, INTERLEAVED), "dp2": (2, "")},
    ),
    "sharded": (
        DENSE,
        (4, f"{TP2} {SHARDED}"),
        {
            "one rank": (1, SHARDED),
            "pp2 x dp2": (4, f"{PP2} {SHARDED}"),
            "cp2 x dp2": (4, f"--context-parallel-size 2 {SHARDED}"),
            "dp4": (4, f"{SHARDED} --micro-batch-size 1"),
        },
    ),
    "experts": (
        MOE,
        (2, f"{EP2} {SHARDED}"),
        {"one rank": (1, SHARDED), "tp2": (2, f"{TP2} --sequence-parallel {SHARDED}")},
    ),
    "experts, plain": (MOE, (2, EP2), {"one rank": (1, ""), "dp2": (2, "")}),
    # Saved in padded buckets, before the weights are gathered.
    "overlapped": (DENSE, (2, OVERLAPPED), {"one rank": (1, SHARDED), "dp4": (4, f"{OVERLAPPED} {SINGLE}")}),
    "overlapped experts": (MOE, (4, f"{EP2} {OVERLAPPED} {SINGLE}"), {"one rank": (1, f"{SHARDED} {SINGLE}")}),
}
CASES = [(kind, name) for kind, (_, _, loads) in KINDS.items() for name in loads]


@pytest.fixture(scope="module")
def saved(setup):  # noqa: F811
    """Return a function that trains a run of each kind once, saving after steps 3, 4, 6 and 8 of 8."""
    argv, _ = setup
    known = {}

    def train(kind: str):
        if kind not in known:
            model, (world_size, flags), _ = KINDS[kind]
            arguments = argv(f"saved {kind}", model, f"{PADDED} {flags} --save-interval 3 --async-save")
            outcome = run_distributed(train_layout, world_size, arguments)[0]
            known[kind] = outcome, Path(arguments[arguments.index("--tst-run-dir") + 1]) / "checkpoints"
        return known[kind]

    return train


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_run_resumes_under_another_layout(setup, saved, kind, name):  # noqa: F811
    argv, _ = setup
    alone, folder = saved(kind)
    model, _, loads = KINDS[kind]
    world_size, flags = loads[name]
    load = ["--load", str(folder), "--ckpt-step", "3"]
    resumed = run_distributed(
        train_layout, world_size, [*argv(f"{kind} at {name}", model, f"{PADDED} {flags}"), *load]
    )[0]
    assert resumed.losses == pytest.approx(alone.losses[3:], rel=1e-5)
    assert resumed.grad_norms == pytest.approx(alone.grad_norms[3:], rel=1e-4)
    assert resumed.valid == pytest.approx(alone.valid, rel=1e-5)


def test_checkpoint_of_another_step_gives_other_losses(setup, saved):  # noqa: F811
    """Negative control: the checkpoint of the switch is loaded instead of that of step 3."""
    argv, _ = setup
    alone, folder = saved("plain")
    load = ["--load", str(folder), "--ckpt-step", "4"]
    resumed = run_distributed(train_layout, 1, [*argv("control", DENSE, PADDED), *load])[0]
    assert resumed.losses != pytest.approx(alone.losses[3:7], rel=1e-5)


def test_run_resumes_bitwise_under_the_same_layout(setup, saved):  # noqa: F811
    argv, _ = setup
    alone, folder = saved("sharded")
    model, (world_size, flags), _ = KINDS["sharded"]
    load = ["--load", str(folder), "--ckpt-step", "6"]
    resumed = run_distributed(train_layout, world_size, [*argv("same", model, f"{PADDED} {flags}"), *load])[0]
    assert (resumed.losses, resumed.grad_norms) == (alone.losses[6:], alone.grad_norms[6:])


def signalled_on_one_rank(argv, rank, step):
    """Train, and send a signal to only one rank within a step."""
    record = MetricsLogger.record

    def recording(monitor, done, *rest):
        if done == step and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGUSR1)
        record(monitor, done, *rest)

    MetricsLogger.record = recording
    return len(train_layout(argv).text)


def test_signal_to_one_rank_stops_all_after_the_same_step(setup):  # noqa: F811
    argv, _ = setup
    arguments = argv("signalled", DENSE, PP2)
    microbatches = run_distributed(signalled_on_one_rank, 2, arguments, 1, 5)
    assert microbatches[0] == microbatches[1] > 0
    folders = CheckpointFolders(Path(arguments[arguments.index("--tst-run-dir") + 1]) / "checkpoints")
    assert (folders.latest(), folders.steps()) == (5, [4, 5])
