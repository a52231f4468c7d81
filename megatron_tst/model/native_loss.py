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
CHUNK_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 27}


class NativeMultiHotCrossEntropy(torch.autograd.Function):
    """Row losses from logits that are neither changed nor copied whole.

    Saves the logits themselves and two floats per row; the backward pass computes each chunk's softmax again and
    writes the gradient, rounded once to the logits' dtype.
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
        max_N = logits_NVp.amax(dim=-1).float()
        if tp_group.size() > 1:
            dist.all_reduce(max_N, op=dist.ReduceOp.MAX, group=tp_group)
        # The float32 maximum makes the difference float32, without a float32 copy of the logits on the way.
        shifted = (logits_NVp[rows] - max_N[rows].unsqueeze(-1) for rows in _chunks(logits_NVp))
        sum_exp_N = torch.cat([chunk.exp_().sum(-1) for chunk in shifted])
        target_logits_NS = logits_NVp.gather(-1, columns.index).float() - max_N.unsqueeze(-1)
        target_logits_NS.masked_fill_(~columns.is_here, 0.0)
        if tp_group.size() > 1:
            # One reduction carries the sum of exponentials and the target logits of every row.
            parts = torch.cat((sum_exp_N.unsqueeze(-1), target_logits_NS), dim=-1)
            dist.all_reduce(parts, group=tp_group)
            sum_exp_N, target_logits_NS = parts[:, 0].contiguous(), parts[:, 1:]
        cross_entropy_NS = sum_exp_N.log().unsqueeze(-1) - target_logits_NS
        loss_N, row_weight_N, coefficients_NS = objective(
            cross_entropy_NS, targets_NS, weights_LBS.flatten(0, 1), is_valid
        )
        coefficients_NS = coefficients_NS * columns.is_here
        ctx.save_for_backward(logits_LBVp, columns.index, coefficients_NS, row_weight_N, max_N, sum_exp_N)
        row_weight = row_weight_N.view(logits_LBVp.shape[:-1])
        ctx.mark_non_differentiable(row_weight)
        return loss_N.view(logits_LBVp.shape[:-1]), row_weight

    @staticmethod
    def backward(ctx: Any, grad_LB: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Return g (omega softmax(z) - sum_i a_i onehot(y_i)), ``[L, B, Vp]`` in the logits' dtype."""
        logits_LBVp, columns_NS, coefficients_NS, row_weight_N, max_N, sum_exp_N = ctx.saved_tensors
        logits_NVp = logits_LBVp.flatten(0, 1)
        grad_N1 = grad_LB.reshape(-1, 1)
        gradient_NVp = torch.empty_like(logits_NVp)
        scale_N1 = grad_N1 * (row_weight_N / sum_exp_N).unsqueeze(-1)
        for rows in _chunks(logits_NVp):
            chunk = gradient_NVp[rows]
            # Float32 gradients are made where they stay; others in a chunk that is rounded once.
            work = chunk if chunk.dtype == torch.float32 else torch.empty_like(chunk, dtype=torch.float32)
            torch.sub(logits_NVp[rows], max_N[rows].unsqueeze(-1), out=work).exp_()
            columns, scale = columns_NS[rows], scale_N1[rows]
            # Written, not added: a column named twice gets one value, in whatever order. Targets that are not here
            # name column 0 with coefficient 0.
            removed = grad_N1[rows] * target_coefficients(columns, coefficients_NS[rows])
            at_targets = work.gather(-1, columns) * scale - removed
            work.mul_(scale).scatter_(-1, columns, at_targets)
            if work is not chunk:
                chunk.copy_(work)
        return gradient_NVp.view_as(logits_LBVp), None, None, None, None, None


def _chunks(logits_NVp: Tensor) -> Iterator[slice]:
    num_rows, num_columns = logits_NVp.shape
    step = max(1, CHUNK_LOGITS[logits_NVp.device.type] // num_columns)
    return (slice(start, start + step) for start in range(0, num_rows, step))
