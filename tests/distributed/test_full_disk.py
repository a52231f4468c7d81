"""If the disk fills while only the main rank writes, every rank ends with the same exit code."""

import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_tst.checkpoint import save
from megatron_tst.config import EXIT_CODE, UserError
from megatron_tst.megatron_patches.versions import common_state_writers
from megatron_tst.telemetry import MetricsFile
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import train_layout
from tests.distributed.test_layouts import DENSE, setup  # noqa: F401
from tests.training.conftest import small_disk  # noqa: F401
from tests.training.test_full_disk import FULL, fill_before

pytestmark = pytest.mark.distributed

PLACES = {
    "common.pt": (*common_state_writers(), (save, "write_common_state"))[0],
    ".metadata": (FileSystemWriterAsync, "finish"),
    "metadata.json": (serialization, "save_config"),
    "metrics.jsonl": (MetricsFile, "write"),
}


def train_on(disk: Path, name: str, argv: list[str]):
    """Train with a disk that is full when the main rank writes a file; return the error and its exit code."""
    with pytest.MonkeyPatch.context() as patches:
        if name in PLACES:
            fill_before(patches, *PLACES[name], disk, is_here=lambda: dist.get_rank() == 0)
        try:
            train_layout(argv)
        except UserError as error:
            return str(error), error.exit_code
    return None


@pytest.mark.parametrize("name", [*PLACES, "the control"])
def test_every_rank_ends_with_the_same_exit_code(setup, small_disk: Path, name):  # noqa: F811
    argv, _ = setup
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    flags = argv(f"full {name}", DENSE, "--use-distributed-optimizer --eval-iters 0")
    if name == "metrics.jsonl":
        run = Path(flags[flags.index("--tst-run-dir") + 1])
        run.mkdir(parents=True)
        (run / "metrics.jsonl").symlink_to(small_disk / "metrics.jsonl")
    else:
        flags += ["--save", str(small_disk)]
    ends = run_distributed(train_on, 2, small_disk, name, flags)
    if name == "the control":
        assert ends == [None, None]
        return
    (line, code), (_, other) = ends
    assert code == other == EXIT_CODE
    assert name in line and FULL in line
    assert not list(small_disk.glob("*iter_*"))
