#!/usr/bin/env python3
"""Step time: our loop against a bare megatron-core loop, and superposed steps against ordinary ones.

    OMP_NUM_THREADS=1 python benchmarks/step.py [--steps 30] [--json step.json]
    python benchmarks/step.py --tst-preset 270m --seq-length 1024 --bf16    another model: flags of pretrain_tst.py

Everything runs in one process, the compared steps in turn; each row is the median of the ratios of neighbouring steps.
Steps read random text, train (forward, backward, optimizer), and, in our loop, log a line of metrics.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_tst.config import parse_config, write_json
from megatron_tst.data.batches import Batch, BatchLoader
from megatron_tst.data.tokenizer import train_bpe
from megatron_tst.distributed import destroy_parallel_state
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.megatron_patches import find_libraries
from megatron_tst.model import build_model
from megatron_tst.superposition import Phase, Schedule
from megatron_tst.training import Run, start_run
from megatron_tst.training.metrics_logger import MetricsLogger

# isort: split
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

MODEL = (
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --make-vocab-size-divisible-by 1 --seq-length 128"
)
TRAINING = (
    "--micro-batch-size 8 --lr 1e-3 --eval-iters 0 --log-interval 1 --num-workers 0 "
    "--split 1,0,0 --tst-bag-size 16 --tst-step-ratio 0.5"
)


def write_text(folder: Path, num_tokens: int) -> None:
    """Write random text, corpus.bin and corpus.idx, and a tokenizer of its vocabulary, tokenizer.json."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    source = Path(argparse.__file__).read_text(encoding="utf-8")
    tokenizer = train_bpe([source], 512, folder / "tokenizer.json")
    builder = IndexedDatasetBuilder(str(folder / "corpus.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    generator = numpy.random.default_rng(0)
    for _ in range(num_tokens // 1000):
        builder.add_document(generator.integers(1, tokenizer.vocab_size, 1000), [1000])
    builder.finalize(str(folder / "corpus.idx"))


def our_step(run: Run, bag_size: int, steps: int) -> Callable[[], None]:
    """Return one step of our loop: read, train, log."""
    schedule = Schedule((Phase(bag_size, steps),))
    phase = next(i for i, p in enumerate(run.schedule.phases) if p.bag_size >= bag_size)
    text = type(run.data.train)([run.data.train.phases[phase]])
    reader = run.read(_Cut(text, run.config.model.seq_length * bag_size), schedule, num_workers=0)
    metrics = MetricsLogger(run)
    metrics.progress.__enter__()
    numbers = iter(range(1, steps + 1))

    def step() -> None:
        number = next(numbers)
        report = run.stepper.train(run.read_step(reader, schedule.phases[0]))
        metrics.record(number, schedule.phase_at(number - 1), report)

    return step


class _Cut(torch.utils.data.Dataset):
    """Samples cut down to the tokens that a smaller bag size reads."""

    def __init__(self, text: torch.utils.data.Dataset, num_tokens: int) -> None:
        self.text, self.num_tokens = text, num_tokens

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        return self.text[key][: self.num_tokens + 1]


def bare_step(run: Run, steps: int) -> Callable[[], None]:
    """Return one step of a loop that megatron-core's own classes make, on ordinary batches."""
    sequence, batch_size = run.config.model.seq_length, run.config.training.micro_batch_size
    chunks = build_model(run.config, run.shape, run.ranks, find_libraries())
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config

    get_model_config(chunks[0]).finalize_model_grads_func = finalize_model_grads
    precision = {"bf16": True, "params_dtype": torch.bfloat16} if run.config.training.bf16 else {}
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0, **precision), chunks)
    schedule, forward_backward = Schedule((Phase(1, steps),)), get_forward_backward_func()
    reader = BatchLoader(
        _Cut(run.data.train, sequence), schedule, run.ranks,
        micro_batch_size=batch_size, global_batch_size=batch_size, vocab_size=run.shape.vocab_size,
    )  # fmt: skip
    shape = run.batch_shape(Phase(1, 1))

    def forward(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        output = model(batch.inputs, batch.position_ids, None, labels=batch.labels)
        return output, lambda loss: (loss.mean(), loss.detach().mean())

    def step() -> None:
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(
            forward_step_func=forward, data_iterator=iter([reader.read(shape)]), model=chunks[0],
            num_microbatches=1, seq_length=sequence, micro_batch_size=batch_size,
        )  # fmt: skip
        optimizer.step()

    return step


def compare(first: Callable[[], None], second: Callable[[], None], steps: int) -> dict[str, float]:
    """Run both in turn and return the median seconds of each and the median ratio."""
    times = []
    for _ in range(steps):
        pair = []
        for step in (first, second):
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pair.append(time.perf_counter() - start)
        times.append(pair)
    settled = times[3:]
    medians = [statistics.median(pair[side] for pair in settled) for side in (0, 1)]
    return {"first_s": medians[0], "second_s": medians[1], "ratio": statistics.median(a / b for a, b in settled)}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    steps = arguments.steps
    flags = [*TRAINING.split(), *flags] if "--tst-preset" in flags else [*MODEL.split(), *TRAINING.split(), *flags]
    with tempfile.TemporaryDirectory() as name:
        files = f"--data-path {name}/corpus --tokenizer-model {name}/tokenizer.json --tst-run-dir {name}/run"
        config = parse_config([*flags, *files.split(), "--train-iters", str(2 * steps)])
        write_text(Path(name), 34 * steps * config.training.micro_batch_size * config.model.seq_length)
        run = start_run(config, StopSignals())
        rows = {
            "our loop / bare megatron-core loop": (lambda: our_step(run, 1, steps), lambda: bare_step(run, steps)),
            "superposed s = 4 / ordinary": (lambda: our_step(run, 4, steps), lambda: our_step(run, 1, steps)),
            "superposed s = 16 / ordinary": (lambda: our_step(run, 16, steps), lambda: our_step(run, 1, steps)),
        }
        results = {row: compare(first(), second(), steps) for row, (first, second) in rows.items()}
        destroy_parallel_state()
    print(f"{run.device.name}, torch {torch.__version__}, {steps} steps a side")
    print("| step | first, ms | second, ms | median of ratios |\n|---|---|---|---|")
    for row, result in results.items():
        print(f"| {row} | {result['first_s'] * 1e3:.1f} | {result['second_s'] * 1e3:.1f} | {result['ratio']:.3f} |")
    if arguments.json:
        arguments.json.write_text(write_json(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
