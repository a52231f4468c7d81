#!/usr/bin/env python3
"""Speed and peak memory of exporting a checkpoint, against plain copying of the same bytes with safetensors.

    python benchmarks/convert.py [--rounds 3] [--max-shard-mb 500] [--folder /tmp] [--json convert.json]

Writes a synthetic bfloat16 checkpoint of some 2.5 GB per shape and deletes it. Each measurement runs in a process of
its own, so that its peak memory is its own; export and copy take turns. The copy loads each exported shard and saves
it. Memory is what comes on top of the process with its libraries loaded; nobody waits for the disk (no fsync).
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
# Layers of two published shapes, so many as make 2.5 GB; the vocabulary is small: layers are what is measured.
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
    """Export the checkpoint as tools/convert_ckpt.py does with --no-verify-checkpoint."""
    saved = find_saved_checkpoint(source, None, check=None)
    Export(saved).write(target, saved.tokenizer, EndOfDocument(0, "<|endoftext|>"), max_shard_bytes, force=True)


def copy(source: Path, target: Path) -> None:
    """Copy safetensors files by loading and saving them."""
    from safetensors.torch import load_file, save_file

    target.mkdir(exist_ok=True)
    for path in sorted(source.glob("*.safetensors")):
        save_file(load_file(path), target / path.name)


def peak_bytes() -> int:
    """Return the most memory this process has held; its parent's does not count, as it does in getrusage."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def touch_memory(num_bytes: int) -> None:
    """Write to as much memory, in another process, and free it.

    A virtual machine's host gives memory on the first touch, at the price of several copies, and takes it back when it
    is free for seconds: what is measured second would find it cheaper.
    """
    subprocess.run([sys.executable, "-c", f"b'1' * {num_bytes}"], check=True)


def measure(what: str, folder: Path, max_shard_bytes: int) -> dict[str, float]:
    """Export or copy once; returns seconds and the memory that came on top."""
    import safetensors.torch  # noqa: F401

    touch_memory(8 << 30)
    before, start = peak_bytes(), time.perf_counter()
    if what == "export":
        export(folder / "checkpoints", folder / TARGETS["export"], max_shard_bytes)
    else:
        copy(folder / TARGETS["export"], folder / TARGETS["copy"])
    return {"s": time.perf_counter() - start, "mib": (peak_bytes() - before) / 2**20}


def compare(name: str, home: Path, rounds: int, max_shard_bytes: int) -> dict[str, Any]:
    """Measure export and copy in turn, each in a process of its own."""
    with tempfile.TemporaryDirectory(dir=home) as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "checkpoints", SHAPES[name])
        found: dict[str, list[dict[str, float]]] = {"export": [], "copy": []}
        for _ in range(rounds):
            for what in found:
                shutil.rmtree(folder / TARGETS[what], ignore_errors=True)
                os.sync()  # else each pays for the bytes that the other left to be written
                command = [sys.executable, __file__, "--one", what, "--folder", temporary]
                command += ["--max-shard-mb", str(max_shard_bytes / 1e6)]
                # As tools/convert_ckpt.py sets it for itself.
                environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
                done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
                found[what].append(json.loads(done.stdout))
        sizes = [path.stat().st_size for path in (folder / "hf").glob("*.safetensors")]
    return {"shape": name, "bytes": sum(sizes), "largest_shard": max(sizes), **found}


HEADS = "shape", "GB", "shard, MiB", "export, MB/s", "copy, MB/s", "ratio", "export, MiB", "copy, MiB", "export / shard"


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table: median speeds, the median of the rounds' ratios, peak memory."""
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
