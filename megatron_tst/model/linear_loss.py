"""Output layer and multi-hot cross-entropy in one function: the logits exist for one chunk of rows at a time.

The forward pass also computes the gradients of the hidden states and of the weight, as if each row's loss had an
upstream gradient of one. If the row losses are summed, all have the same upstream gradient, and the backward pass
multiplies by it: three matrix products in all, as with whole logits. Other upstream gradients are handled as exactly,
but make the backward pass go through the chunks again.

Shape letters: L positions, B sequences, N = L B rows, R rows of a chunk, S bag size, D hidden, Vp local vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from packaging.version import Version
from torch import Tensor

from megatron_tst.config import UserError
from megatron_tst.model.native_loss import compute_row_losses, write_row_gradients
from megatron_tst.shape.loss_chunks import chunk_rows
from megatron_tst.superposition import OBJECTIVES, Objective, target_weights

# Number of columns to convert to float32 at once on devices that cannot add bfloat16 products to a float32 matrix.
CONVERTED_COLUMNS = 512


OLDEST_TORCH = Version("2.10")  # the first version whose addmm adds a product of bfloat16 matrices to a float32 matrix


def check_torch(version: str) -> None:
    """Check that torch can accumulate the weight's gradient on a GPU in bfloat16.

    Args:
        version: version of torch.

    Raises:
        UserError: if torch is too old.
    """
    if Version(version) < OLDEST_TORCH:
        raise UserError(
            f"--cross-entropy-fusion-impl linear: torch is {version}; with --bf16 on a GPU it must be {OLDEST_TORCH} "
            "or later, or use --cross-entropy-fusion-impl native"
        )


class LinearLossOptions(NamedTuple):
    """Options of the loss of a chunk, besides its tensors.

    Attributes:
        objective: function that combines the targets' cross-entropies into the row loss.
        ignore_index: value of targets that carry neither loss nor gradient.
        tp_group: ranks over which the vocabulary is split.
        num_real: number of this shard's columns that stand for tokens; the columns after them get no probability.
        fuse_gradient: whether the weight's gradient is added to its ``main_grad`` here, as megatron-core's layers do
            with gradient accumulation fusion.
        is_training: whether gradients are recorded; a parameter requires its gradient even while torch records none.
    """

    objective: Objective
    ignore_index: int
    tp_group: dist.ProcessGroup
    num_real: int
    fuse_gradient: bool
    is_training: bool


def vocab_parallel_linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    tp_group: dist.ProcessGroup,
    *,
    objective: str = "mce",
    ignore_index: int = -100,
    num_real: int | None = None,
    sequence_parallel: bool = False,
    fuse_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute each row's multi-hot cross-entropy from the hidden states, without holding the logits.

    The result equals the output layer followed by :func:`vocab_parallel_multi_hot_cross_entropy`. Collective: every
    rank of ``tp_group`` calls it and its backward pass.

    Args:
        hidden: ``[L, B, D]`` float32 or bfloat16; ``[L / tp, B, D]`` with sequence parallelism.
        weight: ``[Vp, D]`` of the same dtype, this rank's rows.
        targets: ``[B, L, S]`` token ids, or ``ignore_index``; each rank passes all of them.
        weights: ``[S]`` float32 bag weights.
        tp_group: ranks over which the vocabulary is split.
        objective: ``mce``, or ``mce_alt`` for the total probability of the bag's distinct tokens.
        ignore_index: value of targets that carry neither loss nor gradient.
        num_real: number of rows of ``weight`` that stand for tokens; the default is all. The rows after them are
            neither predicted nor trained.
        sequence_parallel: whether the positions of ``hidden`` are distributed over the ranks.
        fuse_gradient: whether the weight's gradient is added to its ``main_grad`` directly.

    Returns:
        ``(row_loss, row_weight)``, ``[B, L]`` float32: nats per position, and the total weight of its valid targets.

    Raises:
        ValueError: if the objective is unknown.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; choose from {', '.join(OBJECTIVES)}")
    # In the backward pass these regions all-reduce, or reduce-scatter, the ranks' parts of the gradient.
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp_group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    targets_LBS = targets.transpose(0, 1)
    num_real = len(weight) if num_real is None else num_real
    options = LinearLossOptions(
        OBJECTIVES[objective], ignore_index, tp_group, num_real, fuse_gradient, torch.is_grad_enabled()
    )
    loss_LB, weight_LB = LinearMultiHotCrossEntropy.apply(
        hidden, weight, targets_LBS, target_weights(targets_LBS, weights, ignore_index), options
    )
    return loss_LB.transpose(0, 1), weight_LB.transpose(0, 1)


class LinearMultiHotCrossEntropy(torch.autograd.Function):
    """Autograd function of the row losses of hidden states and the output layer's weight."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_LBD: Tensor,
        weight_VpD: Tensor,
        targets_LBS: Tensor,
        weights_LBS: Tensor,
        options: LinearLossOptions,
    ) -> tuple[Tensor, Tensor]:
        """Return row losses and row weights, ``[L, B]`` float32."""
        ctx.options, ctx.shape = options, hidden_LBD.shape
        rows = (hidden_LBD.flatten(0, 1), weight_VpD, targets_LBS.flatten(0, 1), weights_LBS.flatten(0, 1))
        ctx.save_for_backward(*rows)
        needed = [is_needed and options.is_training for is_needed in ctx.needs_input_grad[:2]]
        ctx.gradients = new_gradients(*rows[:2], needed)
        loss_N, row_weight_N = walk_chunks(*rows, options, ctx.gradients, None)
        row_weight = row_weight_N.view(ctx.shape[:-1])
        ctx.mark_non_differentiable(row_weight)
        return loss_N.view(ctx.shape[:-1]), row_weight

    @staticmethod
    def backward(ctx: Any, grad_LB: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of the hidden states and of the weight, each in the dtype of its tensor."""
        hidden_ND, weight_VpD, targets_NS, weights_NS = ctx.saved_tensors
        if is_one_number(grad_LB):
            upstream = grad_LB[0, 0]
        else:
            upstream = torch.ones((), device=grad_LB.device)
            for gradient in ctx.gradients:
                if gradient is not None:
                    gradient.zero_()
            upstream_N = grad_LB.reshape(-1)
            walk_chunks(hidden_ND, weight_VpD, targets_NS, weights_NS, ctx.options, ctx.gradients, upstream_N)
        grad_hidden_ND, grad_weight_VpD = ctx.gradients
        ctx.gradients = None
        if grad_hidden_ND is not None:
            # Given two dimensions, the float32 factor is not rounded to bfloat16 before the multiplication.
            grad_hidden_ND = grad_hidden_ND.mul_(upstream.view(1, 1)).view(ctx.shape)
        if grad_weight_VpD is not None:
            if ctx.options.fuse_gradient:
                grad_weight_VpD = add_to_main_grad(weight_VpD, grad_weight_VpD, upstream)
            else:
                grad_weight_VpD = grad_weight_VpD.mul_(upstream).to(weight_VpD.dtype)
        return grad_hidden_ND, grad_weight_VpD, None, None, None


Gradients = tuple[Tensor | None, Tensor | None]


def new_gradients(hidden_ND: Tensor, weight_VpD: Tensor, needed: list[bool]) -> Gradients:
    """Allocate the gradients that are needed: the hidden states' in their dtype, the weight's in float32."""
    return (
        torch.empty_like(hidden_ND) if needed[0] else None,
        torch.zeros_like(weight_VpD, dtype=torch.float32) if needed[1] else None,
    )


def walk_chunks(
    hidden_ND: Tensor,
    weight_VpD: Tensor,
    targets_NS: Tensor,
    weights_NS: Tensor,
    options: LinearLossOptions,
    gradients: Gradients,
    upstream_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return row losses and row weights, ``[N]`` float32, and compute the gradients that are allocated.

    Args:
        hidden_ND: hidden states of all ranks' positions.
        weight_VpD: this rank's rows of the output layer's weight.
        targets_NS: token ids, or the ignored index.
        weights_NS: float32 weight of each target.
        options: the other options of the loss.
        gradients: gradient of the hidden states, which is overwritten, and of the weight, which is added to.
        upstream_N: float32 gradient of each row's loss; None stands for ones.
    """
    num_rows = len(hidden_ND)
    step = chunk_rows(num_rows)
    loss_N, row_weight_N = weights_NS.new_empty((2, num_rows))
    if upstream_N is None:
        upstream_N = weights_NS.new_ones(num_rows)
    grad_hidden_ND, grad_weight_VpD = gradients
    buffer_RVp = hidden_ND.new_empty(min(step, num_rows), len(weight_VpD))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        hidden_RD = hidden_ND[rows]
        logits_RVp = torch.mm(hidden_RD, weight_VpD.t(), out=buffer_RVp[: len(hidden_RD)])
        # With the lowest finite number instead of -infinity, a shard that is all padding still has a finite maximum.
        logits_RVp[:, options.num_real :] = torch.finfo(logits_RVp.dtype).min
        loss_N[rows], row_weight_N[rows], row_gradients = compute_row_losses(
            logits_RVp, targets_NS[rows], weights_NS[rows],
            options.objective, options.ignore_index, options.tp_group, leave_exponentials=True,
        )  # fmt: skip
        if grad_hidden_ND is None and grad_weight_VpD is None:
            continue
        write_row_gradients(logits_RVp, row_gradients, upstream_N[rows])
        if grad_hidden_ND is not None:
            torch.mm(logits_RVp, weight_VpD, out=grad_hidden_ND[rows])
        if grad_weight_VpD is not None:
            add_product(grad_weight_VpD, logits_RVp, hidden_RD)
    return loss_N, row_weight_N


def add_product(total_VpD: Tensor, left_RVp: Tensor, right_RD: Tensor) -> None:
    """Add ``left^T right`` to a float32 matrix; products of bfloat16 matrices are added in float32, too."""
    if left_RVp.dtype == torch.float32:
        total_VpD.addmm_(left_RVp.t(), right_RD)
    elif left_RVp.is_cuda:
        torch.addmm(total_VpD, left_RVp.t(), right_RD, out_dtype=torch.float32, out=total_VpD)
    else:
        right_RD = right_RD.float()
        for start in range(0, left_RVp.shape[1], CONVERTED_COLUMNS):
            columns = slice(start, start + CONVERTED_COLUMNS)
            total_VpD[columns].addmm_(left_RVp[:, columns].float().t(), right_RD)


def is_one_number(upstream: Tensor) -> bool:
    """Return whether the tensor is an expanded scalar by its strides, as the gradient of a sum is.

    Reading the values instead would wait for the device.
    """
    return all(size == 1 or stride == 0 for size, stride in zip(upstream.shape, upstream.stride(), strict=True))


def add_to_main_grad(weight: Any, gradient: Tensor, factor: Tensor) -> Tensor:
    """Add the scaled gradient to the weight's ``main_grad`` and return the placeholder that megatron-core expects.

    megatron-core's hooks read ``grad_added_to_main_grad``, and run only if there is a gradient: zeros if they add it
    once more, else uninitialised memory suffices.
    """
    weight.main_grad.addcmul_(gradient, factor)
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True
    is_added_again = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if is_added_again else torch.empty_like(weight)
