"""The sparse part of the multi-hot loss: reads and writes the targets' columns of the logits.

Shape letters: L positions, B sequences, S bag size, Vp local vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tst.superposition import target_coefficients


@dataclass(frozen=True)
class TargetColumns:
    """The targets' columns in this rank's shard.

    Attributes:
        index: ``[..., S]`` int64, columns of this shard; 0 where ``is_here`` is false.
        is_here: ``[..., S]`` bool, whether the target is valid and its column is in this shard.
    """

    index: Tensor
    is_here: Tensor

    @classmethod
    def locate(cls, targets: Tensor, is_valid: Tensor, num_columns: int, tp_rank: int) -> "TargetColumns":
        """Find the targets in the shard of ``num_columns`` columns that starts at ``tp_rank * num_columns``."""
        index = targets - tp_rank * num_columns
        is_here = is_valid & (index >= 0) & (index < num_columns)
        return cls(index.masked_fill(~is_here, 0), is_here)


def name_columns_once(columns: Tensor, values: Tensor) -> Tensor:
    """Give the sum of a column's values to the row's first target with this column, and zero to the others.

    Adding the result to the columns then gives bitwise the same sums in any order.

    Args:
        columns: ``[..., S]`` integers.
        values: ``[..., S]`` float32.
    """
    is_same = columns.unsqueeze(-1) == columns.unsqueeze(-2)
    is_first = is_same.int().argmax(dim=-1) == torch.arange(columns.shape[-1], device=columns.device)
    return target_coefficients(columns, values) * is_first


def gather_target_logits(logits: Tensor, columns: TargetColumns, tp_group: dist.ProcessGroup) -> Tensor:
    """Return every target's logit, ``[L, B, S]`` float32; it is zero for targets that are not valid.

    Collective: every rank of the tensor-parallel group calls it; it is one all-reduce.
    """
    target_logits = logits.gather(-1, columns.index).float().masked_fill_(~columns.is_here, 0.0)
    if tp_group.size() > 1:
        dist.all_reduce(target_logits, group=tp_group)
    return target_logits


def write_target_columns(gradient: Tensor, values: Tensor, columns: TargetColumns) -> None:
    """Overwrite the targets' columns with their gradients, in place.

    A target of another shard repeats the write of a target of its row that is in this shard or, if the row has none,
    writes the value that the column already holds. All writes to a column carry the same value, so their order does
    not matter.

    Args:
        gradient: ``[L, B, Vp]`` of any dtype.
        values: ``[L, B, S]`` float32, equal for targets with equal columns.
        columns: the targets' columns.
    """
    first_here = columns.is_here.int().argmax(dim=-1, keepdim=True)
    index = torch.where(columns.is_here, columns.index, columns.index.gather(-1, first_here))
    values = torch.where(columns.is_here, values, values.gather(-1, first_here)).to(gradient.dtype)
    row_has_target = columns.is_here.any(dim=-1, keepdim=True)
    values = torch.where(row_has_target, values, gradient.gather(-1, index))
    gradient.scatter_(-1, index, values)
