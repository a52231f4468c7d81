"""Next-token evaluation, the same in every phase."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_tst.data.batches import IGNORE_INDEX, Batch
from megatron_tst.training.run import Run


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        loss: next-token cross-entropy, nats per token.
        bits_per_byte: the loss in bits per byte of text, on the main rank; None if the bytes of a token are unknown.
    """

    loss: float
    bits_per_byte: float | None


def evaluate(run: Run) -> Evaluation | None:
    """Evaluate on the validation samples, which are the same every time; return None if there are none.

    Collective: every rank of the world calls it.
    """
    schedule = run.validation
    if schedule is None:
        return None
    assert run.data.valid is not None
    reader = run.read(run.data.valid, schedule, num_workers=0)
    losses, counts = [], []
    for _ in range(schedule.num_steps):
        batches = run.read_step(reader, schedule.phases[0])
        losses.append(run.stepper.evaluate(batches))
        counts.append(_count_targets(run, batches))
    loss = float(torch.stack(losses).mean())
    targets, num_bytes = torch.stack(counts).sum(dim=0).tolist()
    return Evaluation(loss, loss * targets / (num_bytes * math.log(2)) if num_bytes else None)


def _count_targets(run: Run, batches: list[Batch | None]) -> torch.Tensor:
    """Return the number of targets of a global batch and of their bytes, ``[2]`` int64; zeros on stages without text.

    Collective: every rank of the world calls it.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=run.device.torch_device)
    if run.token_bytes is not None:
        for batch in batches:
            if batch is not None:
                targets = batch.labels[batch.labels != IGNORE_INDEX]
                counts += torch.stack(
                    (torch.tensor(targets.numel(), device=counts.device), run.token_bytes[targets].sum())
                )
    dist.all_reduce(counts, group=run.ranks.groups.dp_cp)
    return counts
