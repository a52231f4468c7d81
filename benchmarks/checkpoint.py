#!/usr/bin/env python3
"""Measure time and memory of saving and loading a checkpoint, compared with torch.save and torch.load.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [--layers 8] [--hidden-size 512] [--json checkpoint.json]
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/checkpoint.py --use-distributed-optimizer

Weights and Adam's moments are float32, and several ranks are data parallel; torch.save and torch.load handle the state
of each rank. ``blocked`` is the time for which training stops; with ``--async-save`` it ends when the state is copied.
Our save writes checksums and waits for the disk, which torch.save does not; our load verifies the checksums unless told
not to. Ratios are medians over neighboring runs on the first rank. Memory is the highest peak of a rank above its
memory before; ``peak / written`` divides it by the bytes of that rank's files.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_tst.checkpoint.content import TrainState, list_all
from megatron_tst.checkpoint.find import find_checkpoint
from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.checkpoint.load import load_checkpoint
from megatron_tst.checkpoint.run_state import RunState
from megatron_tst.checkpoint.save import CheckpointSaver
from megatron_tst.config import CheckpointSettings, ModelSettings, OptimizerSettings, RunConfig, dump_config, write_json
from megatron_tst.distributed import (
    ParallelSizes,
    enter_device,
    every_rank,
    init_parallel_state,
    run_on_main_rank,
    seed_everything,
)
from megatron_tst.megatron_patches import Libraries
from megatron_tst.model import build_model
from megatron_tst.shape import resolve_shape
from megatron_tst.superposition import Phase, Schedule
from megatron_tst.training.optimizer import build_optimizer, build_scheduler

VOCAB = 8192


class Case:
    """A model with its optimizer state, and all operations that save and load it."""

    def __init__(self, model: ModelSettings, folder: Path, use_distributed_optimizer: bool) -> None:
        """Build the model and its optimizer state; all ranks use the first rank's folder."""
        optimizer_settings = OptimizerSettings(lr=1e-3, use_distributed_optimizer=use_distributed_optimizer)
        config = RunConfig(model=model, optimizer=optimizer_settings)
        ranks = init_parallel_state(ParallelSizes())
        folder = run_on_main_rank(lambda: folder)
        seed_everything(config.training.seed)
        chunks = build_model(config, resolve_shape(config.model, VOCAB), ranks, Libraries())
        optimizer = build_optimizer(config.optimizer, chunks, bf16=False, overlap_param_gather=False)
        self.train_state = TrainState(chunks, optimizer, build_scheduler(config.optimizer, optimizer, 1, 1), ranks)
        self.bytes_per_parameter = 16 if use_distributed_optimizer else 12
        optimizer.step()  # creates Adam's moments; the gradients are zero
        self.model, self.folder = model, folder
        self.state = RunState(
            iteration=1, schedule=Schedule((Phase(1, 1),)), samples_per_phase=(1,), global_batch_size=1,
            vocab_size=VOCAB, tokenizer="", tokenizer_sha256="", sources=[], layout=ranks.layout, is_permanent=True,
            versions={},
        )  # fmt: skip
        self.config_yaml = dump_config(config)

    @property
    def written_bytes(self) -> int:
        """Number of bytes that this rank wrote to files of the last checkpoint."""
        folder = self.folder / "ours" / "iter_0000001"
        return sum(path.stat().st_size for path in folder.glob(f"__{self.train_state.ranks.rank}_*.distcp"))

    @property
    def plain_file(self) -> Path:
        """Path of the file that torch.save writes."""
        return self.folder / f"plain-{self.train_state.ranks.rank}.pt"

    @property
    def num_bytes(self) -> int:
        """Number of bytes of weights and moments; a sharded optimizer also has weights of its own."""
        return self.bytes_per_parameter * sum(
            p.numel() for chunk in self.train_state.chunks for p in chunk.parameters()
        )

    def saver(self, keep_training: bool) -> CheckpointSaver:
        """Return a saver for an empty folder."""
        run_on_main_rank(lambda: shutil.rmtree(self.folder / "ours", ignore_errors=True))
        folders = CheckpointFolders(self.folder / "ours")
        ranks = self.train_state.ranks
        return CheckpointSaver(folders, ranks, self.config_yaml, keep_training=keep_training, keep_last=None)

    def save(self, keep_training: bool) -> tuple[float, float]:
        """Save with our saver; return the seconds that block training, and those until everything is on disk."""
        saver = self.saver(keep_training)
        start = time.perf_counter()
        saver.save(self.state, lambda: list_all(self.train_state, 1, self.model, 1))
        blocked = time.perf_counter() - start
        saver.finish()
        return blocked, time.perf_counter() - start

    def load(self, verify: bool) -> float:
        """Load with our loader; return the seconds."""
        settings = CheckpointSettings(load=str(self.folder / "ours"), no_verify_checkpoint=not verify)
        start = time.perf_counter()
        found = find_checkpoint(settings, self.train_state.ranks)
        assert found is not None
        load_checkpoint(found, self.train_state, with_optimizer=True, with_rng_states=True)
        return time.perf_counter() - start

    def torch_save(self) -> float:
        """Save with torch.save; return the seconds."""
        chunk, (optimizer,) = self.train_state.chunks[0], self.train_state.optimizer.chained_optimizers
        start = time.perf_counter()
        torch.save({"model": chunk.state_dict(), "optimizer": optimizer.optimizer.state_dict()}, self.plain_file)
        return time.perf_counter() - start

    def torch_load(self) -> float:
        """Load with torch.load; return the seconds."""
        (optimizer,) = self.train_state.optimizer.chained_optimizers
        start = time.perf_counter()
        loaded = torch.load(self.plain_file, weights_only=True)
        self.train_state.chunks[0].load_state_dict(loaded["model"])
        optimizer.optimizer.load_state_dict(loaded["optimizer"])
        return time.perf_counter() - start


def peak_of(action: Callable[[], object]) -> int:
    """Return the peak of resident memory during an action minus the memory before it, in bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    action()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def compare(case: Case, repeats: int) -> list[dict]:
    """Return one row per operation that saves or loads."""
    ways: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "save, blocked": (lambda: case.save(keep_training=False)[0], case.torch_save),
        "async save, blocked": (lambda: case.save(keep_training=True)[0], case.torch_save),
        "async save, until on disk": (lambda: case.save(keep_training=True)[1], case.torch_save),
        "load, verified": (lambda: case.load(verify=True), case.torch_load),
        "load, not verified": (lambda: case.load(verify=False), case.torch_load),
    }
    rows = []
    for name, (ours, plain) in ways.items():
        pairs = [(ours(), plain()) for _ in range(repeats + 1)][1:]
        peak = peak_of(ours)
        seconds, plain_seconds = (statistics.median(side) for side in zip(*pairs, strict=True))
        rows.append(
            {
                "way": name,
                "s": seconds,
                "mb_per_s": case.num_bytes / 1e6 / seconds,
                "plain_s": plain_seconds,
                "ratio": statistics.median(a / b for a, b in pairs),
                "peak_mib": max(every_rank(peak)) / 2**20,
                "peak_per_written": max(every_rank(peak / case.written_bytes)),
                "plain_peak_mib": peak_of(plain) / 2**20,
            }
        )
    return rows


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder to write to; default: a temporary folder")
    parser.add_argument("--use-distributed-optimizer", action="store_true", help="shard the optimizer's state")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = enter_device()
    model = ModelSettings(
        num_layers=arguments.layers, hidden_size=arguments.hidden_size, num_attention_heads=8, seq_length=64,
        position_embedding_type="rope", normalization="RMSNorm", swiglu=True, disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        case = Case(model, Path(folder), arguments.use_distributed_optimizer)
        rows = compare(case, arguments.repeats)
    if not case.train_state.ranks.is_main:
        return
    ranks, size = case.train_state.ranks.world_size, case.num_bytes / 2**20
    print(f"{device.name}, {ranks} ranks, torch {torch.__version__}, {size:.0f} MiB of weights and moments")
    print("| operation | s | MB/s | torch, s | ratio | peak, MiB | peak / written | torch, peak, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['way']} | {row['s']:.2f} | {row['mb_per_s']:.0f} | {row['plain_s']:.2f} | {row['ratio']:.2f} | "
            f"{row['peak_mib']:.0f} | {row['peak_per_written']:.2f} | {row['plain_peak_mib']:.0f} |"
        )
    if arguments.json:
        arguments.json.write_text(write_json(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
