#!/usr/bin/env python3
"""Compare step times: our loop with megatron-core's classes and the stock trainer, superposed with ordinary steps.

    OMP_NUM_THREADS=1 python benchmarks/step.py [--steps 30] [--vocab 512 4096 32768] [--json step.json]
    python benchmarks/step.py --tst-preset 270m --seq-length 1024 --bf16    another model: flags of pretrain_tst.py

The compared steps alternate; each row is the median of the ratios of neighbouring steps, in CPU time on a CPU and in
wall-clock time on a CUDA device. Steps read random text, train (forward, backward, optimizer), and, in our loop and the
stock trainer, log a line. ``bare megatron-core loop`` is a loop over megatron-core's schedule and optimizer with
megatron-core's own loss. ``stock trainer`` is Megatron-LM's unmodified trainer in a separate process, if it can be
started on the CPU: ``megatron.training`` of 0.19, or for 0.16.1 Megatron-LM's folder in PYTHONPATH.
"""

import argparse
import functools
import importlib.util
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
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
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model

MODEL = (
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --make-vocab-size-divisible-by 1 --seq-length 128"
)
TRAINING = (
    "--micro-batch-size 8 --lr 1e-3 --eval-iters 0 --log-interval 1 --num-workers 0 "
    "--split 1,0,0 --tst-bag-size 16 --tst-step-ratio 0.5"
)
# Flags that override the settings of tests/checkpoint/stock_trainer.py with the defaults that MODEL relies on.
STOCK = (
    "--max-position-embeddings 128 --kv-channels 32 --num-query-groups 4 --norm-epsilon 1e-5 --rotary-base 10000 "
    "--init-method-std 0.02 --micro-batch-size 8 --global-batch-size 8 --lr 1e-3"
)
# Function that runs a step and returns its seconds.
Side = Callable[[], float]


def clocked(step: Callable[[], None]) -> Side:
    """Return a step that measures its seconds: CPU time on a CPU, since the wall clock includes other processes."""

    def side() -> float:
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        started = clock()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock() - started

    return side


def write_text(folder: Path, num_tokens: int, vocab_size: int) -> None:
    """Write random text over a vocabulary, corpus.bin and corpus.idx, and a small tokenizer, tokenizer.json."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    source = Path(argparse.__file__).read_text(encoding="utf-8")
    train_bpe([source], 512, folder / "tokenizer.json")
    builder = IndexedDatasetBuilder(str(folder / "corpus.bin"), dtype=DType.optimal_dtype(vocab_size))
    generator = numpy.random.default_rng(0)
    for _ in range(num_tokens // 1000):
        builder.add_document(generator.integers(1, vocab_size, 1000), [1000])
    builder.finalize(str(folder / "corpus.idx"))


def our_step(run: Run, bag_size: int, steps: int) -> Side:
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

    return clocked(step)


class _Cut(torch.utils.data.Dataset):
    """A dataset whose samples are truncated to the tokens that a smaller bag size reads."""

    def __init__(self, text: torch.utils.data.Dataset, num_tokens: int) -> None:
        self.text, self.num_tokens = text, num_tokens

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        return self.text[key][: self.num_tokens + 1]


def bare_step(run: Run, steps: int) -> Side:
    """Return one step of a loop of megatron-core's own classes and its loss, on ordinary batches."""
    sequence, batch_size = run.config.model.seq_length, run.config.training.micro_batch_size
    chunks = build_model(run.config, run.shape, run.ranks, find_libraries())
    for chunk in chunks:
        model = unwrap_model(chunk)
        model.compute_language_model_loss = functools.partial(GPTModel.compute_language_model_loss, model)
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

    return clocked(step)


def has_stock_trainer() -> bool:
    """Return whether Megatron-LM's own trainer can be started, with the CPU in place of its GPU."""
    found = importlib.util.find_spec("pretrain_gpt") or importlib.util.find_spec("megatron.training")
    return found is not None and not torch.cuda.is_available()


def stock_step(vocab_size: int, steps: int, log: Path) -> Side:
    """Start the stock trainer and return one step of it, measured in CPU time of its process."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=run_stock_trainer, args=(theirs, vocab_size, steps + 1, log), daemon=True)
    process.start()
    theirs.close()

    def side() -> float:
        try:
            ours.send(None)
            return ours.recv()
        except (EOFError, OSError):
            raise SystemExit(f"the stock trainer ended:\n{log.read_text()[-3000:]}") from None

    return side


def run_stock_trainer(gate: Connection, vocab_size: int, steps: int, log: Path) -> None:
    """Train with the stock trainer; each step waits at the gate and sends the seconds of the previous one."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.checkpoint import stock_trainer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    enter_card = stock_trainer.enter_card
    started: list[float] = []

    def enter_and_gate() -> None:
        enter_card()
        from megatron.training import training

        train_step = training.train_step

        def gated(*args: Any, **kwargs: Any) -> Any:
            if started:
                # The time from one gate to the next includes the trainer's work between its steps.
                gate.send(time.process_time() - started[-1])
            gate.recv()
            started.append(time.process_time())
            return train_step(*args, **kwargs)

        training.train_step = gated

    stock_trainer.enter_card = enter_and_gate
    # NullTokenizer adds one token to the vocabulary.
    sizes = ["--vocab-size", str(vocab_size - 1), "--train-iters", str(steps)]
    stock_trainer.main([*MODEL.split(), *STOCK.split(), *sizes])


def compare(first: Side, second: Side, steps: int) -> dict[str, float]:
    """Run both in turn and return the median seconds of each and the median ratio."""
    settled = [(first(), second()) for _ in range(steps)][3:]
    medians = [statistics.median(pair[side] for pair in settled) for side in (0, 1)]
    return {"first_s": medians[0], "second_s": medians[1], "ratio": statistics.median(a / b for a, b in settled)}


def compare_all(flags: list[str], vocab_size: int | None, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Build a run, with the flags' vocabulary if ``vocab_size`` is None, and compare its steps with the others."""
    with tempfile.TemporaryDirectory() as name:
        files = f"--data-path {name}/corpus --tokenizer-model {name}/tokenizer.json --tst-run-dir {name}/run"
        size = ["--vocab-size", str(vocab_size)] if vocab_size else []
        config = parse_config([*flags, *size, *files.split(), "--train-iters", str(2 * steps)])
        num_tokens = 34 * steps * config.training.micro_batch_size * config.model.seq_length
        write_text(Path(name), num_tokens, config.model.vocab_size or 512)
        run = start_run(config, StopSignals())
        ours = {size: functools.partial(our_step, run, size, steps) for size in (1, 4, 16)}
        rows: dict[str, tuple[Callable[[], Side], Callable[[], Side]]] = {
            "our loop / bare megatron-core loop": (ours[1], lambda: bare_step(run, steps)),
            "superposed s = 4 / ordinary": (ours[4], ours[1]),
            "superposed s = 16 / ordinary": (ours[16], ours[1]),
        }
        if vocab_size and has_stock_trainer():
            stock = functools.partial(stock_step, vocab_size, steps, Path(name) / "stock.log")
            rows["our loop / stock trainer"] = ours[1], stock
            rows["superposed s = 4 / stock trainer, ordinary"] = ours[4], stock
        found = {}
        for row, (first, second) in rows.items():
            results = [compare(first(), second(), steps) for _ in range(rounds)]
            found[row] = {key: statistics.median(result[key] for result in results) for key in results[0]}
        destroy_parallel_state()
    return found


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=1, help="repetitions of all steps; medians are printed")
    parser.add_argument("--vocab", type=int, nargs="+", default=[512], help="sizes for the model without --tst-preset")
    parser.add_argument("--json", type=Path)
    arguments, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    is_own_model = "--tst-preset" not in flags
    flags = [*(MODEL.split() if is_own_model else []), *TRAINING.split(), *flags]
    results = {}
    for vocab_size in arguments.vocab if is_own_model else [None]:
        found = compare_all(flags, vocab_size, arguments.steps, arguments.rounds)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{device}, torch {torch.__version__}, {arguments.rounds} x {arguments.steps} steps a side", end="")
        print(f", vocabulary {vocab_size}" if vocab_size else "")
        print("| step | first, ms | second, ms | median of ratios |\n|---|---|---|---|")
        for row, result in found.items():
            times = f"{result['first_s'] * 1e3:.1f} | {result['second_s'] * 1e3:.1f} | {result['ratio']:.3f}"
            print(f"| {row} | {times} |", flush=True)
        results[str(vocab_size)] = found
    if arguments.json:
        arguments.json.write_text(write_json(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
