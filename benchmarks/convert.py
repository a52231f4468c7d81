#!/usr/bin/env python3
"""Measure speed and peak memory of exporting a checkpoint, compared with copying the same bytes by safetensors.

    python benchmarks/convert.py [--rounds 3] [--max-shard-mb 500] [--folder /tmp] [--json convert.json]

Writes a synthetic bfloat16 checkpoint of about 2.5 GB per shape and deletes it. Each measurement runs in a separate
process to isolate its peak memory; export and copy alternate. The copy loads each exported shard and saves it. Memory
is measured above that of the process with its libraries loaded; neither side waits for the disk (no fsync).
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_tst.config import PRESETS, DataSettings, ModelSettings, RunConfig, write_json
from megatron_tst.conversion.saved_checkpoints import complete_weights, find_saved_checkpoint
from megatron_tst.conversion.settings import architecture_of
from megatron_tst.conversion.tables import pieces
from megatron_tst.conversion.to_hugging_face import EndOfDocument, Export
from megatron_tst.conversion.torch_dist import Slice, write_stacked
from megatron_tst.shape import resolve_shape

TARGETS = {"export": "hf", "copy": "copy"}
VOCAB = 32000
# Layers of two published models, as many as make 2.5 GB. The vocabulary is small, because layers are to be measured.
SHAPES = {
    "3b, 14 layers": {**PRESETS["3b"], "num_layers": 14},
    "10b-a1b, 4 layers": {**PRESETS["10b-a1b"], "num_layers": 4},
}


def write_checkpoint(folder: Path, settings: dict[str, Any]) -> None:
    """Write a checkpoint of random weights."""
    model = ModelSettings(**{**settings, "vocab_size": VOCAB})
    shape = dataclasses.replace(resolve_shape(model), padded_vocab_size=VOCAB)
    noise = torch.randn(1 << 20).bfloat16()

    def weight(size: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        count = torch.Size(size).numel()
        return lambda: noise.repeat(count // len(noise) + 1)[:count].view(size)

    slices = []
    for row, index in pieces(architecture_of(model).rows_of(tied=False), shape):
        size = row.megatron_size(shape)
        slices.append(Slice(row.megatron, row.stacked(shape), index, size, torch.bfloat16, weight(size)))
    (folder / "iter_0000000").mkdir(parents=True)
    write_stacked(folder / "iter_0000000", slices, [], lambda _: None)
    (folder / "tokenizer.json").write_text("{}")
    complete_weights(folder, RunConfig(model=model, data=DataSettings(tokenizer_model=str(folder / "tokenizer.json"))))


def export(source: Path, target: Path, max_shard_bytes: int) -> None:
    """Export the checkpoint like tools/convert_ckpt.py with --no-verify-checkpoint."""
    saved = find_saved_checkpoint(source, None, check=None)
    Export(saved).write(target, saved.tokenizer, EndOfDocument(0, "<|endoftext|>"), max_shard_bytes, force=True)


def copy(source: Path, target: Path) -> None:
    """Copy safetensors files by loading and saving them."""
    from safetensors.torch import load_file, save_file

    target.mkdir(exist_ok=True)
    for path in sorted(source.glob("*.safetensors")):
        save_file(load_file(path), target / path.name)


def peak_bytes() -> int:
    """Return the peak memory of this process; unlike getrusage, this does not include the parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def touch_memory(num_bytes: int) -> None:
    """Allocate, write and free the given amount of memory in another process.

    A virtual machine's host provides memory at the first access, which costs as much as several copies, and reclaims it
    after it has been free for seconds. Without this call, the second measurement would find the memory cheaper.
    """
    subprocess.run([sys.executable, "-c", f"b'1' * {num_bytes}"], check=True)


def measure(what: str, folder: Path, max_shard_bytes: int) -> dict[str, float]:
    """Export or copy once; return the seconds and the additional memory."""
    import safetensors.torch  # noqa: F401

    touch_memory(8 << 30)
    before, start = peak_bytes(), time.perf_counter()
    if what == "export":
        export(folder / "checkpoints", folder / TARGETS["export"], max_shard_bytes)
    else:
        copy(folder / TARGETS["export"], folder / TARGETS["copy"])
    return {"s": time.perf_counter() - start, "mib": (peak_bytes() - before) / 2**20}


def compare(name: str, home: Path, rounds: int, max_shard_bytes: int) -> dict[str, Any]:
    """Measure export and copy alternately, each in a separate process."""
    with tempfile.TemporaryDirectory(dir=home) as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "checkpoints", SHAPES[name])
        found: dict[str, list[dict[str, float]]] = {"export": [], "copy": []}
        for _ in range(rounds):
            for what in found:
                shutil.rmtree(folder / TARGETS[what], ignore_errors=True)
                os.sync()  # otherwise each would also wait for the other's pending writes
                command = [sys.executable, __file__, "--one", what, "--folder", temporary]
                command += ["--max-shard-mb", str(max_shard_bytes / 1e6)]
                # tools/convert_ckpt.py sets this variable itself.
                environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
                done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
                found[what].append(json.loads(done.stdout))
        sizes = [path.stat().st_size for path in (folder / "hf").glob("*.safetensors")]
    return {"shape": name, "bytes": sum(sizes), "largest_shard": max(sizes), **found}


HEADS = "shape", "GB", "shard, MiB", "export, MB/s", "copy, MB/s", "ratio", "export, MiB", "copy, MiB", "export / shard"


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table: median speeds, the median of the ratios over rounds, and peak memory."""
    times = {what: [run["s"] for run in row[what]] for what in TARGETS}
    memory = {what: max(run["mib"] for run in row[what]) for what in TARGETS}
    speeds = [f"{row['bytes'] / statistics.median(times[what]) / 1e6:.0f}" for what in TARGETS]
    ratio = statistics.median(copied / exported for exported, copied in zip(*times.values(), strict=True))
    shard_mib = row["largest_shard"] / 2**20
    peaks = [f"{memory[what]:.0f}" for what in TARGETS]
    share = f"{memory['export'] / shard_mib:.2f}"
    return [row["shape"], f"{row['bytes'] / 1e9:.2f}", f"{shard_mib:.0f}", *speeds, f"{ratio:.2f}", *peaks, share]


def main() -> None:
    """Measure each shape and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-shard-mb", type=float, default=500)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=("export", "copy"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    max_shard_bytes = int(arguments.max_shard_mb * 1e6)
    if arguments.one:
        json.dump(measure(arguments.one, arguments.folder, max_shard_bytes), sys.stdout)
        return
    print(f"| {' | '.join(HEADS)} |")
    print("|---" * len(HEADS) + "|")
    rows = []
    for name in SHAPES:
        rows.append(compare(name, arguments.folder, arguments.rounds, max_shard_bytes))
        print(f"| {' | '.join(cells(rows[-1]))} |", flush=True)
    if arguments.json:
        arguments.json.write_text(write_json(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
