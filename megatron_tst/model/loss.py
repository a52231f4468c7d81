"""The vocabulary-parallel multi-hot cross-entropy: one interface to its implementations.

Shape letters: L positions, B sequences, S bag size, Vp local vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tst.model.native_loss import NativeMultiHotCrossEntropy
from megatron_tst.model.te_loss import TEMultiHotCrossEntropy, load_kernel
from megatron_tst.superposition import OBJECTIVES, target_weights

LossImplementation = Literal["te", "native", "linear"]


@dataclass(frozen=True)
class LossChoice:
    """The loss that a model computes from labels.

    Attributes:
        bag_weights: name of the bag weights.
        objective: ``mce`` or ``mce_alt``.
        implementation: ``te``, ``native`` or ``linear``.
    """

    bag_weights: str = "uniform"
    objective: str = "mce"
    implementation: LossImplementation = "native"


def vocab_parallel_multi_hot_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    tp_group: dist.ProcessGroup,
    implementation: LossImplementation = "native",
    *,
    objective: str = "mce",
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Compute each row's multi-hot cross-entropy with one softmax at any bag size.

    Collective: every rank of ``tp_group`` calls it with its columns of the same rows.

    Args:
        logits: ``[L, B, Vp]`` float32 or bfloat16, this rank's columns. If they require a gradient, it is written into
            their memory, unless they are a leaf or the operation that made them needs its result for its own gradient.
        targets: ``[B, L, S]`` token ids, or ``ignore_index``; each rank passes all of them.
        weights: ``[S]`` float32 bag weights.
        tp_group: ranks over which the vocabulary is split.
        implementation: ``te`` for Transformer Engine's fused kernel, ``native`` for torch operations. (``linear`` takes
            hidden states in place of logits: :func:`vocab_parallel_linear_multi_hot_cross_entropy`.)
        objective: ``mce``, or ``mce_alt`` for the total probability of the bag's distinct tokens.
        ignore_index: value of targets that carry neither loss nor gradient.

    Returns:
        ``(row_loss, row_weight)``, ``[B, L]`` float32: nats per position, and the total weight of its valid targets.

    Raises:
        ValueError: if implementation or objective is unknown.
        UserError: if Transformer Engine is missing or its version is not supported.
    """
    if implementation not in ("te", "native"):
        raise ValueError(f"cross-entropy implementation {implementation!r} is unknown; choose te or native")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; choose from {', '.join(OBJECTIVES)}")
    targets_LBS = targets.transpose(0, 1)
    weights_LBS = target_weights(targets_LBS, weights, ignore_index)
    if not _is_ours(logits):
        logits = logits.clone()
    arguments = (logits.contiguous(), targets_LBS, weights_LBS, OBJECTIVES[objective])
    if implementation == "native":
        loss_LB, weight_LB = NativeMultiHotCrossEntropy.apply(*arguments, ignore_index, tp_group)
    elif targets.shape[-1] == 1 and objective == "mce" and load_kernel().rounds_once:
        # The kernel itself computes the loss of a single target.
        loss_LB = load_kernel()(logits, targets_LBS.squeeze(-1), ignore_index, tp_group)
        weight_LB = weights_LBS.squeeze(-1)
    else:
        loss_LB, weight_LB = TEMultiHotCrossEntropy.apply(*arguments, load_kernel(), ignore_index, tp_group)
    return loss_LB.transpose(0, 1), weight_LB.transpose(0, 1)


def _is_ours(logits: Tensor) -> bool:
    """Return whether neither the caller nor the operation that made the logits reads them again."""
    # An operation whose gradient follows from its result, such as the tanh of a soft cap, saves it under this name.
    return not logits.requires_grad or not (logits.is_leaf or hasattr(logits.grad_fn, "_saved_result"))


class _PaddingMask(torch.autograd.Function):
    """Give the columns from ``num_real`` on no probability, in place and without copying the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, num_real: int) -> Tensor:
        """Fill the padding with the lowest finite number, so that a shard that is all padding has a finite maximum."""
        ctx.mark_dirty(logits)
        logits[..., num_real:] = torch.finfo(logits.dtype).min
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient unchanged: that of a cross-entropy is zero where the probability is zero."""
        return grad, None


def mask_vocabulary_padding(logits: Tensor, vocab_size: int, tp_rank: int) -> Tensor:
    """Exclude the columns that pad the vocabulary from the softmax, so that they are neither predicted nor trained.

    Args:
        logits: ``[..., Vp]``, changed in place.
        vocab_size: number of columns that stand for tokens, over all ranks.
        tp_rank: tensor-parallel rank whose columns these are.

    Returns:
        The same logits.
    """
    num_columns = logits.shape[-1]
    num_real = real_columns(num_columns, vocab_size, tp_rank)
    return logits if num_real == num_columns else _PaddingMask.apply(logits, num_real)


def real_columns(num_columns: int, vocab_size: int, tp_rank: int) -> int:
    """Return how many of a rank's columns stand for tokens; these are the rank's first columns.

    Args:
        num_columns: number of columns of each rank.
        vocab_size: number of columns that stand for tokens, over all ranks.
        tp_rank: tensor-parallel rank whose columns these are.
    """
    return min(max(vocab_size - tp_rank * num_columns, 0), num_columns)
