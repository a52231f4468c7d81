"""The multi-hot cross-entropy in torch operations: any device, one softmax whatever the bag size.

Shape letters: L positions, B sequences, N = L B rows, S bag size, Vp local vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tst.model.target_columns import TargetColumns
from megatron_tst.superposition import Objective, target_coefficients

# Rows are worked through in float32 chunks of about this many logits: small enough for a CPU's cache, large enough
# for a GPU to be busy.
CHUNK_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 24}


class NativeMultiHotCrossEntropy(torch.autograd.Function):
    """Row losses, whose gradient takes the place of the logits.

    The forward pass leaves the exponentials of float32 logits where the logits were, so that the backward pass only
    scales them. Exponentials rounded to bfloat16 would round the gradient twice: there the logits stay, and the
    backward pass computes the exponentials again. Without a gradient to come, the logits are left unchanged.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_LBVp: Tensor,
        targets_LBS: Tensor,
        weights_LBS: Tensor,
        objective: Objective,
        ignore_index: int,
        tp_group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        """Return row losses and row weights, ``[L, B]`` float32."""
        logits_NVp, targets_NS = logits_LBVp.flatten(0, 1), targets_LBS.flatten(0, 1)
        is_valid = targets_NS != ignore_index
        columns = TargetColumns.locate(targets_NS, is_valid, logits_NVp.shape[-1], tp_group.rank())
        target_logits_NS = logits_NVp.gather(-1, columns.index).float()
        ctx.holds_exponentials = ctx.needs_input_grad[0] and logits_NVp.dtype == torch.float32
        local_max_N, sum_exp_N = _exponentiate(logits_NVp, in_place=ctx.holds_exponentials)
        max_N = local_max_N.clone()
        if tp_group.size() > 1:
            dist.all_reduce(max_N, op=dist.ReduceOp.MAX, group=tp_group)
        # This shard's exponentials are relative to its own maximum.
        to_common_N = torch.exp(local_max_N - max_N)
        sum_exp_N *= to_common_N
        target_logits_NS = (target_logits_NS - max_N.unsqueeze(-1)).masked_fill_(~columns.is_here, 0.0)
        if tp_group.size() > 1:
            # One reduction carries the sum of exponentials and the target logits of every row.
            parts = torch.cat((sum_exp_N.unsqueeze(-1), target_logits_NS), dim=-1)
            dist.all_reduce(parts, group=tp_group)
            sum_exp_N, target_logits_NS = parts[:, 0], parts[:, 1:]
        cross_entropy_NS = sum_exp_N.log().unsqueeze(-1) - target_logits_NS
        loss_N, row_weight_N, coefficients_NS = objective(
            cross_entropy_NS, targets_NS, weights_LBS.flatten(0, 1), is_valid
        )
        removed_NS = target_coefficients(columns.index, coefficients_NS * columns.is_here)
        # Turns this shard's exponentials into omega times the probabilities.
        scale_N = row_weight_N * to_common_N / sum_exp_N
        ctx.save_for_backward(logits_LBVp, columns.index, removed_NS, local_max_N, scale_N)
        row_weight = row_weight_N.view(logits_LBVp.shape[:-1])
        ctx.mark_non_differentiable(row_weight)
        return loss_N.view(logits_LBVp.shape[:-1]), row_weight

    @staticmethod
    def backward(ctx: Any, grad_LB: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Return g (omega softmax(z) - sum_i a_i onehot(y_i)), ``[L, B, Vp]``, in the logits' memory and dtype."""
        logits_LBVp, columns_NS, removed_NS, local_max_N, scale_N = ctx.saved_tensors
        logits_NVp = logits_LBVp.flatten(0, 1)
        grad_N1 = grad_LB.reshape(-1, 1)
        scale_N1, removed_NS = scale_N.unsqueeze(-1) * grad_N1, removed_NS * grad_N1
        for rows in _chunks(logits_NVp):
            chunk, columns, scale = logits_NVp[rows], columns_NS[rows], scale_N1[rows]
            exponentials = chunk
            if not ctx.holds_exponentials:
                exponentials = chunk.float().sub_(local_max_N[rows].unsqueeze(-1)).exp_()
            # Written, not added: a column named twice gets one value, in whatever order. Targets that are not here
            # name column 0, from which the targets that are there are removed alike.
            at_targets = exponentials.gather(-1, columns) * scale - removed_NS[rows]
            gradient = exponentials.mul_(scale).scatter_(-1, columns, at_targets)
            if gradient is not chunk:
                chunk.copy_(gradient)
        return logits_LBVp, None, None, None, None, None


def _exponentiate(logits_NVp: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    """Return each row's maximum m and sum of exp(z - m), ``[N]`` float32; ``in_place`` leaves the latter in z."""
    max_N, sum_exp_N = logits_NVp.new_empty((2, len(logits_NVp)), dtype=torch.float32)
    for rows in _chunks(logits_NVp):
        work = logits_NVp[rows].to(torch.float32, copy=not in_place)
        torch.amax(work, dim=-1, out=max_N[rows])
        work.sub_(max_N[rows].unsqueeze(-1)).exp_()
        torch.sum(work, dim=-1, out=sum_exp_N[rows])
    return max_N, sum_exp_N


def _chunks(logits_NVp: Tensor) -> Iterator[slice]:
    num_rows, num_columns = logits_NVp.shape
    step = max(1, CHUNK_LOGITS[logits_NVp.device.type] // num_columns)
    return (slice(start, start + step) for start in range(0, num_rows, step))
