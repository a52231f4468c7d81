"""The vocabulary-parallel multi-hot cross-entropy, behind one interface.

Shape letters: L positions, B sequences, S bag size, Vp local vocabulary.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tst.model.native_loss import NativeMultiHotCrossEntropy
from megatron_tst.superposition import target_weights

LossImplementation = Literal["native"]


def vocab_parallel_multi_hot_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    tp_group: dist.ProcessGroup,
    implementation: LossImplementation = "native",
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Compute each row's multi-hot cross-entropy with one softmax, whatever the bag size.

    Collective: every rank of ``tp_group`` calls it with its columns of the same rows.

    Args:
        logits: ``[L, B, Vp]`` float32 or bfloat16, this rank's columns; left unchanged by ``native``.
        targets: ``[B, L, S]`` token ids, or ``ignore_index``; each rank passes all of them.
        weights: ``[S]`` float32 bag weights.
        tp_group: the ranks that share the vocabulary.
        implementation: ``native`` torch operations.
        ignore_index: marks targets that carry neither loss nor gradient.

    Returns:
        ``(row_loss, row_weight)``, ``[B, L]`` float32: nats per position, and the weight of its valid targets.

    Raises:
        ValueError: if the implementation is unknown.
    """
    if implementation != "native":
        raise ValueError(f"cross-entropy implementation {implementation!r} is unknown; choose native")
    weights_BLS = target_weights(targets, weights, ignore_index)
    targets_LBS, weights_LBS = targets.transpose(0, 1), weights_BLS.transpose(0, 1)
    loss_LB = NativeMultiHotCrossEntropy.apply(logits, targets_LBS, weights_LBS, tp_group)
    return loss_LB.transpose(0, 1), weights_BLS.sum(dim=-1)


class _PaddingMask(torch.autograd.Function):
    """Give the columns from ``num_real`` on no probability: in place, and no copy of the gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, num_real: int) -> Tensor:
        """Fill the padding with minus infinity."""
        ctx.mark_dirty(logits)
        logits[..., num_real:] = -torch.inf
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient on: a cross-entropy leaves zero where there is no probability."""
        return grad, None


def mask_vocabulary_padding(logits: Tensor, vocab_size: int, tp_rank: int) -> Tensor:
    """Exclude the columns that pad the vocabulary from the softmax, so that they are neither predicted nor trained.

    Args:
        logits: ``[..., Vp]``, changed in place.
        vocab_size: columns that stand for tokens, over all ranks.
        tp_rank: which Vp columns these are.

    Returns:
        The same logits.
    """
    num_columns = logits.shape[-1]
    num_real = min(max(vocab_size - tp_rank * num_columns, 0), num_columns)
    return logits if num_real == num_columns else _PaddingMask.apply(logits, num_real)
