#!/usr/bin/env python3
"""Measure time and peak memory of the multi-hot cross-entropy, compared with an ordinary one-target cross-entropy.

    OMP_NUM_THREADS=1 python benchmarks/loss.py [--rows 1024] [--vocab 16384] [--dtype float32] [--json loss.json]
    OMP_NUM_THREADS=1 python benchmarks/loss.py --rows 1024 256 --vocab 4096 32768 --variants native    two sizes
    OMP_NUM_THREADS=1 python benchmarks/loss.py --hidden 256 --rows 8192 --vocab 151936 --repeats 2    with output layer
    python benchmarks/loss.py --te-wheel FOLDER    the kernel's Python files from an unpacked wheel, on a CUDA device

It runs forward and backward passes on the same logits, on one rank. The variants are ``te`` (Transformer Engine's
kernel, if it is installed or given as a wheel and there is a CUDA device), ``native`` (torch operations), ``loop`` (one
megatron-core cross-entropy per target, as in the paper) and ``torch, 1 target``. Each is compared with an ordinary
one-target cross-entropy: ``te`` with Transformer Engine's own, the others with megatron-core's, which overwrites its
float32 logits. Times are CPU time on a CPU and wall-clock time on a CUDA device, as medians of the ratios of
neighbouring runs; memory is the peak above the logits, on a CPU measured in a separate process for each variant.

With ``--hidden`` the output layer is included: inputs are hidden states and weight, and their gradients are computed.
The others are then compared with ``native`` (a matrix product, then the native loss): ``linear``, which never holds the
logits, ``loop``, which takes gigabytes at large vocabularies, and ``megatron-core, 1 target``. Memory is the peak above
the weight, the hidden states and the weight's gradient.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_tst.config import write_json
from megatron_tst.distributed import ParallelSizes, enter_device, init_parallel_state
from megatron_tst.megatron_patches import find_libraries
from megatron_tst.model import loss as loss_module
from megatron_tst.model import vocab_parallel_linear_multi_hot_cross_entropy, vocab_parallel_multi_hot_cross_entropy
from megatron_tst.model.te_loss import adapt_kernel
from megatron_tst.superposition import bag_weights

# isort: split
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

ONE_TARGET = "megatron-core, 1 target"
# Function of the logits or, with the output layer, of hidden states and weight; and of the targets.
Loss = Callable[..., torch.Tensor]
Memory = Callable[["Case", str, int], int]


def use_wheel(folder: Path) -> None:
    """Load Transformer Engine's kernel from the Python files of an unpacked wheel, without its compiled library."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.model.kernels import load_wheel

    kernel = adapt_kernel(load_wheel(folder))
    loss_module.load_kernel = lambda: kernel


def variants(group: torch.distributed.ProcessGroup, has_te: bool) -> dict[str, Loss]:
    """Return the losses to measure; each maps logits ``[L, B, V]`` and targets ``[B, L, S]`` to row losses."""

    def multi_hot(implementation: str) -> Loss:
        def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            weights = bag_weights("uniform", targets.shape[-1], logits.device)
            return vocab_parallel_multi_hot_cross_entropy(logits, targets, weights, group, implementation)[0]

        return loss

    def loop(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # The function overwrites float32 logits, so each target needs a copy.
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


def variants_with_output_layer(losses: dict[str, Loss], group: torch.distributed.ProcessGroup) -> dict[str, Loss]:
    """Return the losses to measure from hidden states ``[L, B, D]``, weight ``[V, D]`` and targets ``[B, L, S]``."""

    def behind_output_layer(loss: Loss) -> Loss:
        return lambda hidden, weight, targets: loss(torch.matmul(hidden, weight.t()), targets)

    def linear(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        weights = bag_weights("uniform", targets.shape[-1], hidden.device)
        return vocab_parallel_linear_multi_hot_cross_entropy(hidden, weight, targets, weights, group)[0]

    names = [name for name in ("native", "te", "loop", ONE_TARGET) if name in losses]
    return {"linear": linear} | {name: behind_output_layer(losses[name]) for name in names}


class Case:
    """The sizes of a measurement, which runs a loss forward and backward on random logits."""

    weight_gradient_bytes = 0

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        """Store the sizes."""
        self.rows, self.vocab, self.dtype, self.device = rows, vocab, dtype, device
        self.logits = torch.randn(rows, 1, vocab, device=device, dtype=dtype).requires_grad_()

    def run(self, loss: Loss, bag_size: int) -> float:
        """Return the seconds of one forward and backward pass."""
        targets = torch.randint(0, self.vocab, (1, self.rows, bag_size), device=self.device)
        inputs = self._inputs()
        self._wait()
        # CPU time excludes the time in which other processes use the core.
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        start = clock()
        loss(*inputs, targets).sum().backward()
        self._wait()
        return clock() - start

    def _inputs(self) -> tuple[torch.Tensor, ...]:
        self.logits.grad = None
        # As in a model, the logits are the output of an operation, so the loss may overwrite them.
        return (self.logits * 1.0,)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class CaseWithOutputLayer(Case):
    """The sizes of a measurement, which runs a loss on random hidden states and an output layer's weight."""

    def __init__(self, rows: int, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        """Store the sizes."""
        self.rows, self.vocab, self.dtype, self.device = rows, vocab, dtype, device
        self.hidden = torch.randn(rows, 1, hidden, device=device, dtype=dtype).requires_grad_()
        self.weight = (torch.randn(vocab, hidden, device=device, dtype=dtype) * hidden**-0.5).requires_grad_()
        self.weight_gradient_bytes = self.weight.nbytes

    def _inputs(self) -> tuple[torch.Tensor, ...]:
        self.hidden.grad = self.weight.grad = None
        return self.hidden, self.weight


def measure_memory(case: Case, loss: Loss, bag_size: int) -> int:
    """Return the peak bytes of one pass, without the memory in use before it and the weight's gradient."""
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.run(loss, bag_size)
        return torch.cuda.max_memory_allocated() - before - case.weight_gradient_bytes
    # On Linux this resets the high-water mark of resident memory to the current value.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    case.run(loss, bag_size)
    return _resident_bytes("VmHWM") - before - case.weight_gradient_bytes


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def compare(
    case: Case, losses: dict[str, Loss], base: str, bag_sizes: list[int], repeats: int, memory_of: Memory
) -> Iterator[dict]:
    """Yield a row per bag size and variant, with ratios to the loss that it is compared with."""
    for bag_size in bag_sizes:
        for name in [name for name in losses if name != base]:
            # Transformer Engine's one-target loss is its own kernel with a bag of one.
            other, size = ("te", 1) if name == "te" and base == ONE_TARGET else (base, bag_size)
            pairs = [(case.run(losses[name], bag_size), case.run(losses[other], size)) for _ in range(repeats + 1)][1:]
            memory = memory_of(case, name, bag_size)
            base_memory = memory_of(case, other, 1 if base == ONE_TARGET else bag_size)
            yield {
                "rows": case.rows,
                "vocab": case.vocab,
                "bag_size": bag_size,
                "variant": name,
                "ms": statistics.median(a for a, _ in pairs) * 1e3,
                "base_ms": statistics.median(b for _, b in pairs) * 1e3,
                "time_ratio": statistics.median(a / b for a, b in pairs),
                "mib": memory / 2**20,
                "base_mib": base_memory / 2**20,
                "memory_ratio": memory / base_memory,
            }


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024])
    parser.add_argument("--vocab", type=int, nargs="+", default=[16384])
    parser.add_argument("--hidden", type=int, help="hidden size: measure the output layer along with the loss")
    parser.add_argument("--bag-sizes", type=int, nargs="+", default=[1, 4, 6, 16])
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--te-wheel", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print the table."""
    arguments = read_arguments()
    device, ranks = enter_device(), init_parallel_state(ParallelSizes())
    if arguments.te_wheel:
        use_wheel(arguments.te_wheel)
    has_te = arguments.te_wheel is not None or find_libraries().transformer_engine is not None
    losses = variants(ranks.groups.tp, has_te and torch.cuda.is_available())
    base = ONE_TARGET
    if arguments.hidden:
        losses, base = variants_with_output_layer(losses, ranks.groups.tp), "native"
    losses = {name: losses[name] for name in (base, *(arguments.variants or losses))}

    def make(rows: int, vocab: int) -> Case:
        dtype, place = getattr(torch, arguments.dtype), device.torch_device
        if arguments.hidden:
            return CaseWithOutputLayer(rows, vocab, arguments.hidden, dtype, place)
        return Case(rows, vocab, dtype, place)

    if arguments.memory_of:
        rows, vocab, bag_size = (int(number) for number in arguments.memory_of[1:])
        loss = losses[arguments.memory_of[0]]
        # A run of two rows first excludes kernels, threads and small buffers from the peak.
        make(2, vocab).run(loss, bag_size)
        print(measure_memory(make(rows, vocab), loss, bag_size))
        return

    @functools.cache
    def memory_of(case: Case, name: str, bag_size: int) -> int:
        if torch.cuda.is_available():
            return measure_memory(case, losses[name], bag_size)
        size = (str(number) for number in (case.rows, case.vocab, bag_size))
        command = [sys.executable, *sys.argv, "--memory-of", name, *size]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    print(f"{device.name}, torch {torch.__version__}, {arguments.dtype}")
    other = "native" if arguments.hidden else "one target"
    print(f"| rows | V | S | variant | ms | {other}, ms | time ratio | peak, MiB | {other}, MiB | memory ratio |")
    print("|---" * 10 + "|")
    results = []
    for size in zip(arguments.rows, arguments.vocab, strict=True):
        for row in compare(make(*size), losses, base, arguments.bag_sizes, arguments.repeats, memory_of):
            print(
                f"| {row['rows']} | {row['vocab']} | {row['bag_size']} | {row['variant']} | {row['ms']:.1f} | "
                f"{row['base_ms']:.1f} | {row['time_ratio']:.2f} | {row['mib']:.0f} | {row['base_mib']:.0f} | "
                f"{row['memory_ratio']:.2f} |",
                flush=True,
            )
            results.append(row)
    if arguments.json:
        arguments.json.write_text(write_json(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
