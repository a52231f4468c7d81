#!/usr/bin/env python3
"""Time and peak memory of the multi-hot cross-entropy against an ordinary one-target cross-entropy.

    OMP_NUM_THREADS=1 python benchmarks/loss.py [--rows 1024] [--vocab 16384] [--dtype float32] [--json loss.json]
    python benchmarks/loss.py --te-wheel FOLDER    the kernel's Python files from an unpacked wheel, on a CUDA device

Forward and backward on the same logits, one rank. Variants: ``te`` (Transformer Engine's kernel, where it is installed
or given as a wheel, and there is a CUDA device), ``native`` (torch operations), ``loop`` (one megatron-core
cross-entropy per target, as the paper does it), ``torch, 1 target``. Each is a ratio to an ordinary one-target
cross-entropy: Transformer Engine's own for ``te``, megatron-core's for the others, which overwrites its float32 logits.
Times are the process's own on a CPU and the wall clock's on a CUDA device, medians of ratios of neighbouring runs;
memory is the peak above the logits, on a CPU of each variant in its own process.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_tst.config import write_json
from megatron_tst.distributed import ParallelSizes, enter_device, init_parallel_state
from megatron_tst.megatron_patches import find_libraries
from megatron_tst.model import loss as loss_module
from megatron_tst.model import vocab_parallel_multi_hot_cross_entropy
from megatron_tst.model.te_loss import adapt_kernel
from megatron_tst.superposition import bag_weights

# isort: split
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

BAG_SIZES = (1, 4, 6, 16)
ONE_TARGET = "megatron-core, 1 target"
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def use_wheel(folder: Path) -> None:
    """Take Transformer Engine's kernel from the Python files of an unpacked wheel, without its compiled library."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.model.kernels import load_wheel

    kernel = adapt_kernel(load_wheel(folder))
    loss_module.load_kernel = lambda: kernel


def variants(group: torch.distributed.ProcessGroup, has_te: bool) -> dict[str, Loss]:
    """Return the losses to measure, each from logits ``[L, B, V]`` and targets ``[B, L, S]`` to row losses."""

    def multi_hot(implementation: str) -> Loss:
        def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            weights = bag_weights("uniform", targets.shape[-1], logits.device)
            return vocab_parallel_multi_hot_cross_entropy(logits, targets, weights, group, implementation)[0]

        return loss

    def loop(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # A copy per target: the function overwrites float32 logits.
        parts = [vocab_parallel_cross_entropy(logits * 1.0, t.transpose(0, 1)) for t in targets.unbind(-1)]
        return torch.stack(parts).mean(0)

    def torch_alone(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows, columns = logits.flatten(0, 1), targets[..., 0].transpose(0, 1).flatten()
        return torch.nn.functional.cross_entropy(rows, columns, reduction="none")

    def megatron_core(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_cross_entropy(logits, targets[..., 0].transpose(0, 1))

    found = {ONE_TARGET: megatron_core, "native": multi_hot("native"), "loop": loop, "torch, 1 target": torch_alone}
    if has_te:
        found["te"] = multi_hot("te")
    return found


class Case:
    """One size: makes logits, runs a loss forward and backward."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        """Fix the size."""
        self.rows, self.vocab, self.dtype, self.device = rows, vocab, dtype, device
        self.logits = torch.randn(rows, 1, vocab, device=device, dtype=dtype).requires_grad_()

    def run(self, loss: Loss, bag_size: int) -> float:
        """Return the seconds of one forward and backward pass."""
        targets = torch.randint(0, self.vocab, (1, self.rows, bag_size), device=self.device)
        self.logits.grad = None
        # As in a model, the logits are an operation's output: they may be overwritten.
        output = self.logits * 1.0
        self._wait()
        # While other processes have the core, the wall clock goes on.
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        start = clock()
        loss(output, targets).sum().backward()
        self._wait()
        return clock() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure_memory(case: Case, loss: Loss, bag_size: int) -> int:
    """Return the peak bytes of one pass above what is held before it."""
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.run(loss, bag_size)
        return torch.cuda.max_memory_allocated() - before
    # Linux: resets the high-water mark of resident memory to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    case.run(loss, bag_size)
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def compare(case: Case, losses: dict[str, Loss], repeats: int, memory_of: Callable[[str, int], int]) -> list[dict]:
    """Return a row per bag size and variant, with ratios to the one-target loss of its kind."""
    rows = []
    for bag_size in BAG_SIZES:
        for name in [name for name in losses if name != ONE_TARGET]:
            # Transformer Engine's one-target loss is its own kernel with a bag of one.
            base, base_size = (losses["te"], 1) if name == "te" else (losses[ONE_TARGET], bag_size)
            pairs = [(case.run(losses[name], bag_size), case.run(base, base_size)) for _ in range(repeats)][1:]
            memory, base_memory = memory_of(name, bag_size), memory_of("te" if name == "te" else ONE_TARGET, 1)
            rows.append(
                {
                    "bag_size": bag_size,
                    "variant": name,
                    "ms": statistics.median(a for a, _ in pairs) * 1e3,
                    "one_target_ms": statistics.median(b for _, b in pairs) * 1e3,
                    "time_ratio": statistics.median(a / b for a, b in pairs),
                    "mib": memory / 2**20,
                    "memory_ratio": memory / base_memory,
                }
            )
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--te-wheel", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, ranks = enter_device(), init_parallel_state(ParallelSizes())
    if arguments.te_wheel:
        use_wheel(arguments.te_wheel)
    has_te = arguments.te_wheel is not None or find_libraries().transformer_engine is not None
    losses = variants(ranks.groups.tp, has_te and torch.cuda.is_available())
    case = Case(arguments.rows, arguments.vocab, getattr(torch, arguments.dtype), device.torch_device)
    if arguments.memory_of:
        name, bag_size = arguments.memory_of
        # Two rows first: kernels, threads and small buffers are not part of the peak.
        Case(2, arguments.vocab, case.dtype, case.device).run(losses[name], int(bag_size))
        print(measure_memory(case, losses[name], int(bag_size)))
        return

    def memory_of(name: str, bag_size: int) -> int:
        if torch.cuda.is_available():
            return measure_memory(case, losses[name], bag_size)
        command = [sys.executable, *sys.argv, "--memory-of", name, str(bag_size)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    rows = compare(case, losses, arguments.repeats, memory_of)
    print(f"{device.name}, torch {torch.__version__}, rows {arguments.rows}, V {arguments.vocab}, {arguments.dtype}")
    print(
        "| S | variant | ms | one target, ms | time ratio | peak, MiB | memory ratio |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['bag_size']} | {row['variant']} | {row['ms']:.1f} | {row['one_target_ms']:.1f} | "
            f"{row['time_ratio']:.2f} | {row['mib']:.0f} | {row['memory_ratio']:.2f} |"
        )
    if arguments.json:
        arguments.json.write_text(write_json(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
