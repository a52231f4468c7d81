"""The preflight reports a node's problem before the first step, with the node's name."""

import os
import re
import time
from pathlib import Path

import pytest

from megatron_tst import preflight
from megatron_tst.config import UserError, parse_config
from megatron_tst.distributed.rendezvous import Rendezvous
from tests.distributed.launch import run_distributed
from tests.training.runs import arguments

pytestmark = pytest.mark.distributed


def look(argv, fault=None):
    """Run the preflight on this rank as a node of its own, on rank 1 with a fault if given; return its message."""
    rank = os.environ["RANK"]
    os.environ["SLURMD_NODENAME"], os.environ["TST_NODES"] = f"node{rank}", "node0 node1"
    if rank == "1" and fault is not None and fault(argv) == "absent":
        return None
    try:
        preflight.check_cluster(parse_config(argv))
    except UserError as error:
        return str(error)
    return "fit"


def no_data(argv):
    argv[argv.index("--data-path") + 1] += "-elsewhere"


def shorter_data(argv):
    sizes = preflight.data_sizes
    preflight.data_sizes = lambda config: [(path, size - 1) for path, size in sizes(config)]


def late_clock(argv):
    now = time.time
    preflight.time.time = lambda: now() - 60


def no_room(argv):
    preflight.checkpoint_bytes = lambda *_: 1 << 60


def other_library(argv):
    found = preflight.find_libraries()
    preflight.find_libraries = lambda: type(found)(transformer_engine="2.9.0", apex=None)


def no_place(argv):
    argv += ["--save", f"{argv[argv.index('--tokenizer-model') + 1]}/checkpoints"]


def broken_network(argv):
    preflight.all_reduce_speed = lambda *_: "unhandled system error"


def slow_network(argv):
    speed = preflight.all_reduce_speed
    preflight.all_reduce_speed = lambda *args: min(speed(*args), 1e-9)


def absent(argv):
    return "absent"


FAULTS = {
    no_data: r"node1: .*corpus-elsewhere\.bin cannot be read: No such file",
    shorter_data: r"node1 has .*corpus\.bin with \d+ bytes, but most nodes have \d+ bytes|node0 has .*corpus\.bin",
    late_clock: r"node1: its clock differs from the median by -\d+ s|node0: its clock .* by \+\d+ s",
    no_room: r"node1: .*checkpoints has [\d.]+ GB free, but two checkpoints need",
    other_library: r"node1 has transformer_engine 2.9.0, but most nodes have None|node0 has transformer_engine None",
    no_place: r"node1: .*checkpoints cannot be written: Not a directory",
    broken_network: r"all-reduce between nodes: .*node1: unhandled system error",
    slow_network: r"all-reduce between nodes: node1: 0.0 GB/s \(minimum 1e-06 GB/s\)",
    absent: r"no report from rank 1 on node1 within 0:00:0[58]",
}


@pytest.fixture
def argv(corpus, tokenizer, tmp_path: Path):
    return arguments(
        corpus, str(tokenizer.path), tmp_path / "run", "--preflight-timeout 8 --preflight-min-gb-per-s 1e-6"
    )


def test_healthy_nodes_pass(argv):
    assert run_distributed(look, 2, argv) == ["fit", "fit"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_reported_on_every_rank(argv, fault):
    lines = run_distributed(look, 2, argv, fault)
    assert lines[0].startswith("preflight: ")
    assert re.search(FAULTS[fault], lines[0]), lines[0]
    assert lines[1] in (None, lines[0])


def meet_nobody(_):
    os.environ["MASTER_ADDR"], os.environ["RANK"] = "127.0.0.1", "1"
    os.environ["MASTER_PORT"] = "1"
    try:
        Rendezvous(timeout_s=2)
    except UserError as error:
        return str(error), error.own_rank


def test_unreachable_main_rank_is_named():
    ((line, own_rank),) = run_distributed(meet_nobody, 1, None)
    assert re.search(r"cannot reach 127\.0\.0\.1:2 \(MASTER_ADDR, MASTER_PORT\)", line)
    assert own_rank
