"""The multi-hot cross-entropy in torch operations, on any device, with one softmax at any bag size.

Shape letters: L positions, B sequences, N = L B rows, S bag size, Vp local vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tst.model.target_columns import TargetColumns, name_columns_once
from megatron_tst.superposition import Objective

# Rows are processed in float32 chunks of about this many logits, small enough for the cache of a CPU and large enough
# to keep a GPU busy.
CHUNK_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 24}


class RowGradients(NamedTuple):
    """The tensors that turn rows of logits into the gradients of their losses.

    Attributes:
        columns: ``[N, S]`` int64, the targets' columns in this shard; 0 for a target of another shard.
        removed: ``[N, S]`` float32, the amount that each target subtracts from its column; 0 for one of another shard.
        maximum: ``[N]`` float32, this shard's largest logit.
        scale: ``[N]`` float32, omega over the sum of exponentials of all shards, relative to this shard's maximum.
    """

    columns: Tensor
    removed: Tensor
    maximum: Tensor
    scale: Tensor


class NativeMultiHotCrossEntropy(torch.autograd.Function):
    """Autograd function of the row losses, whose gradient is written into the memory of the logits.

    For float32 logits the forward pass replaces the logits by their exponentials, so that the backward pass only
    scales them. Exponentials rounded to bfloat16 would round the gradient twice, so bfloat16 logits are kept and the
    backward pass computes the exponentials again. If no gradient is needed, the logits are left unchanged.
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
        rows = (logits_LBVp.flatten(0, 1), targets_LBS.flatten(0, 1), weights_LBS.flatten(0, 1))
        loss_N, weight_N, gradients = compute_row_losses(
            *rows, objective, ignore_index, tp_group, leave_exponentials=ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(logits_LBVp, *gradients)
        row_weight = weight_N.view(logits_LBVp.shape[:-1])
        ctx.mark_non_differentiable(row_weight)
        return loss_N.view(logits_LBVp.shape[:-1]), row_weight

    @staticmethod
    def backward(ctx: Any, grad_LB: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Return g (omega softmax(z) - sum_i a_i onehot(y_i)), ``[L, B, Vp]``, in the logits' memory and dtype."""
        logits_LBVp, *gradients = ctx.saved_tensors
        write_row_gradients(logits_LBVp.flatten(0, 1), RowGradients(*gradients), grad_LB.reshape(-1))
        return logits_LBVp, None, None, None, None, None


def compute_row_losses(
    logits_NVp: Tensor,
    targets_NS: Tensor,
    weights_NS: Tensor,
    objective: Objective,
    ignore_index: int,
    tp_group: dist.ProcessGroup,
    *,
    leave_exponentials: bool,
) -> tuple[Tensor, Tensor, RowGradients]:
    """Return row losses and row weights, ``[N]`` float32, and the tensors that their gradients follow from.

    Collective: one all-gather of S + 2 numbers per row over the tensor-parallel group.

    Args:
        logits_NVp: float32 or bfloat16, this rank's columns.
        targets_NS: token ids or ``ignore_index``.
        weights_NS: float32 weight of each target, 0 where it is ignored.
        objective: function that combines the targets' cross-entropies into the row loss.
        ignore_index: value of targets that carry neither loss nor gradient.
        tp_group: ranks over which the vocabulary is split.
        leave_exponentials: whether exp(z - maximum) replaces float32 logits, as :func:`write_row_gradients` needs it.
    """
    is_valid_NS = targets_NS != ignore_index
    columns = TargetColumns.locate(targets_NS, is_valid_NS, logits_NVp.shape[-1], tp_group.rank())
    target_logits_NS = logits_NVp.gather(-1, columns.index).float().masked_fill_(~columns.is_here, 0.0)
    local_max_N, sum_exp_N = _exponentiate(logits_NVp, in_place=leave_exponentials)
    max_N, to_common_N = local_max_N, torch.ones_like(local_max_N)
    if tp_group.size() > 1:
        parts = torch.cat((torch.stack((local_max_N, sum_exp_N), dim=-1), target_logits_NS), dim=-1)
        gathered = parts.new_empty(tp_group.size(), *parts.shape)
        dist.all_gather(list(gathered), parts, group=tp_group)
        # Each shard's exponentials are relative to its own maximum.
        max_N = gathered[..., 0].amax(dim=0)
        to_common_N = torch.exp(local_max_N - max_N)
        sum_exp_N = (gathered[..., 1] * torch.exp(gathered[..., 0] - max_N)).sum(dim=0)
        target_logits_NS = gathered[..., 2:].sum(dim=0)
    cross_entropy_NS = sum_exp_N.log().unsqueeze(-1) - (target_logits_NS - max_N.unsqueeze(-1))
    loss_N, row_weight_N, coefficients_NS = objective(cross_entropy_NS, targets_NS, weights_NS, is_valid_NS)
    removed_NS = coefficients_NS * columns.is_here
    if removed_NS.is_cuda:
        # A GPU adds in an arbitrary order, a CPU in the order of the targets.
        removed_NS = name_columns_once(columns.index, removed_NS)
    scale_N = row_weight_N * to_common_N / sum_exp_N
    return loss_N, row_weight_N, RowGradients(columns.index, removed_NS, local_max_N, scale_N)


def write_row_gradients(logits_NVp: Tensor, gradients: RowGradients, upstream_N: Tensor) -> None:
    """Overwrite the logits, as :func:`compute_row_losses` left them, with the gradient of the losses.

    The weights of several targets in one column are added in float32, before the gradient is rounded once.

    Args:
        logits_NVp: bfloat16 logits, or the exponentials of float32 logits.
        gradients: tensors of the same rows, from :func:`compute_row_losses`.
        upstream_N: float32 gradient of each row's loss.
    """
    columns_NS, removed_NS, max_N, scale_N = gradients
    upstream_N1 = upstream_N.unsqueeze(-1)
    if logits_NVp.dtype == torch.float32:
        scale_N1, removed_NS = scale_N.unsqueeze(-1) * upstream_N1, removed_NS * -upstream_N1
        for rows in _chunks(logits_NVp):
            logits_NVp[rows].mul_(scale_N1[rows]).scatter_add_(-1, columns_NS[rows], removed_NS[rows])
        return
    # exp(z - max + log scale) is omega times the probability, which saves a separate pass for the scale.
    shift_N1 = (max_N - scale_N.log()).unsqueeze(-1)
    work = _work(logits_NVp)
    for rows in _chunks(logits_NVp):
        chunk = logits_NVp[rows]
        out = work[: len(chunk)]
        gradient = torch.sub(_operand(chunk, out), shift_N1[rows], out=out).exp_()
        gradient.scatter_add_(-1, columns_NS[rows], -removed_NS[rows])
        _multiply(gradient, upstream_N1[rows], chunk)


def _exponentiate(logits_NVp: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    """Return each row's maximum m and sum of exp(z - m), ``[N]`` float32; ``in_place`` replaces z by exp(z - m)."""
    max_N, sum_exp_N = logits_NVp.new_empty((2, len(logits_NVp)), dtype=torch.float32)
    in_place = in_place and logits_NVp.dtype == torch.float32
    work = logits_NVp if in_place else _work(logits_NVp)
    for rows in _chunks(logits_NVp):
        chunk = logits_NVp[rows]
        out = chunk if in_place else work[: len(chunk)]
        operand = _operand(chunk, out)
        max_N[rows] = operand.amax(dim=-1)
        torch.sum(torch.sub(operand, max_N[rows].unsqueeze(-1), out=out).exp_(), dim=-1, out=sum_exp_N[rows])
    return max_N, sum_exp_N


def _chunks(logits_NVp: Tensor) -> Iterator[slice]:
    num_rows, step = len(logits_NVp), _chunk_rows(logits_NVp)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _chunk_rows(logits_NVp: Tensor) -> int:
    return max(1, CHUNK_LOGITS[logits_NVp.device.type] // logits_NVp.shape[1])


def _work(logits_NVp: Tensor) -> Tensor:
    """Return float32 memory for the rows of a chunk."""
    num_rows, num_columns = logits_NVp.shape
    return logits_NVp.new_empty(min(_chunk_rows(logits_NVp), num_rows), num_columns, dtype=torch.float32)


def _operand(chunk: Tensor, work: Tensor) -> Tensor:
    """Return the chunk in the form that is read fastest: unchanged on a GPU, converted to float32 on a CPU."""
    return chunk if chunk.is_cuda or chunk.dtype == torch.float32 else work.copy_(chunk)


def _multiply(values: Tensor, factor_N1: Tensor, out: Tensor) -> None:
    """Write ``values * factor`` to ``out``, rounded to its dtype; on a CPU this overwrites ``values``."""
    if out.is_cuda:
        torch.mul(values, factor_N1, out=out)
    else:
        out.copy_(values.mul_(factor_N1))
