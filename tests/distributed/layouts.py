"""A small run under a given parallel layout, started from given weights: what a rank executes and returns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_tst.config import parse_config
from megatron_tst.data import batches
from megatron_tst.distributed import destroy_parallel_state
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.telemetry import read_metrics
from megatron_tst.training import start_run, train
from megatron_tst.training.experts import ExpertCounter, ExpertCounts
from megatron_tst.training.run import Run

# A piece of a weight: name, global offset, global shape, and values.
Piece = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]


@dataclass
class Outcome:
    """What one rank recorded of a run.

    Attributes:
        losses: loss of each step, on the main rank.
        grad_norms: gradient norm of each step, on the main rank.
        valid: losses and bits per byte of the evaluations, on the main rank.
        pieces: this rank's pieces of the final weights.
        text: rows of each micro-batch that this rank made, as tuples of token ids.
        expert_counts: positions per layer and expert in each step.
        shapes: shape of the decoder's output in each forward pass.
        padding: elements of padding at the end of each gradient bucket of this rank.
    """

    losses: list[float]
    grad_norms: list[float]
    valid: list[float]
    pieces: list[Piece]
    text: list[list[tuple[int, ...]]]
    expert_counts: list[Any]
    shapes: list[torch.Size]
    padding: list[int]


def pieces(run: Run) -> list[Piece]:
    """Return this rank's pieces of all weights as views, at the offsets that megatron-core reports."""
    found: list[Piece] = []

    def visit(node: Any) -> None:
        if isinstance(node, ShardedTensorFactory):
            visit(node.build())
        elif isinstance(node, ShardedTensor):
            found.append((node.key, node.global_offset, node.global_shape, node.data))
        elif isinstance(node, dict | list | tuple):
            for child in node.values() if isinstance(node, dict) else node:
                visit(child)

    for chunk in run.stepper.train_state.chunks:
        visit(chunk.module.sharded_state_dict())
    return found


def padding(run: Run) -> list[int]:
    """Return the elements of padding at the end of each of this rank's gradient buckets."""
    buffers = [
        buffer
        for chunk in run.stepper.train_state.chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)  # type: ignore[misc]
    ]
    return [bucket.grad_data.numel() - bucket.numel_unpadded for buffer in buffers for bucket in buffer.buckets]


def whole(parts: list[Piece]) -> dict[str, Tensor]:
    """Assemble the weights from the pieces of all ranks."""
    weights: dict[str, Tensor] = {}
    for key, offset, shape, part in parts:
        total = weights.setdefault(key, torch.full(shape, torch.nan))
        place(total, offset, part).copy_(part.detach().float().view(place(total, offset, part).shape))
    return weights


def fill(run: Run, weights: dict[str, Tensor]) -> None:
    """Copy this rank's pieces of the given weights into its model."""
    with torch.no_grad():
        for key, offset, _, part in pieces(run):
            slot = place(weights[key], offset, part)
            # This layout may pad the vocabulary further; the extra padding keeps its values.
            target = part.view(-1, *part.shape[1:]) if part.dim() == slot.dim() else part
            rows = tuple(slice(0, n) for n in slot.shape)
            target[rows].copy_(slot) if target.dim() == slot.dim() else target.copy_(slot.view(target.shape))
    run.stepper.train_state.optimizer.reload_model_params()


def place(total: Tensor, offset: tuple[int, ...], part: Tensor) -> Tensor:
    """Return the view of a whole weight that a piece covers; its layer and expert axes have length one."""
    lead = len(offset) - part.dim()
    sizes = (*([1] * lead), *part.shape)
    return total[tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))]


def train_layout(argv: list[str], initial: dict[str, Tensor] | None = None) -> Outcome:
    """Build a run, start it from the given weights, and train it."""
    signals = StopSignals()
    run = start_run(parse_config(argv), signals)
    if initial is not None:
        fill(run, initial)
    text: list[list[tuple[int, ...]]] = []
    shapes: list[torch.Size] = []
    make_batch = batches.make_batch

    def recording(rows: Tensor, shape: batches.BatchShape) -> batches.Batch:
        text.append([tuple(row) for row in rows.tolist()])
        return make_batch(rows, shape)

    for chunk in run.stepper.train_state.chunks:
        for name, module in chunk.named_modules():
            if name.endswith("decoder"):
                module.register_forward_hook(lambda _, __, output: shapes.append(output.shape))
    expert_counts: list[Any] = []
    take = ExpertCounter.take

    def recording_take(counter: ExpertCounter) -> ExpertCounts:
        counts = take(counter)
        expert_counts.append(counts.taken)
        return counts

    ExpertCounter.take = recording_take
    batches.make_batch = recording
    try:
        train(run, signals)
    finally:
        batches.make_batch, ExpertCounter.take = make_batch, take
    path = Path(run.directory.metrics)
    lines = read_metrics(path) if run.ranks.is_main else []
    outcome = Outcome(
        losses=[line["loss"] for line in lines if "loss" in line],
        grad_norms=[line["grad_norm"] for line in lines if "loss" in line],
        valid=[
            value for line in lines if "valid_loss" in line for value in (line["valid_loss"], line["bits_per_byte"])
        ],
        pieces=[(key, offset, shape, part.detach().clone()) for key, offset, shape, part in pieces(run)],
        text=text,
        expert_counts=[counts.tolist() for counts in expert_counts],
        shapes=shapes,
        padding=padding(run),
    )
    destroy_parallel_state()
    return outcome


def initial_weights(argv: list[str]) -> dict[str, Tensor]:
    """Return the initial weights of a run on one rank."""
    run = start_run(parse_config(argv), StopSignals())
    weights = {key: value.clone() for key, value in whole(pieces(run)).items()}
    destroy_parallel_state()
    return weights
