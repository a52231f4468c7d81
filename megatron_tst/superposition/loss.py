"""The multi-hot cross-entropy (MCE): arithmetic shared by every implementation, and the reference itself.

For one row of logits z with targets y_i, bag weights w_i and validity m_i::

    row loss   l     = sum_i w_i m_i CE(z, y_i),   CE(z, y) = logsumexp(z) - z_y
    row weight omega = sum_i w_i m_i
    gradient   dl/dz = omega softmax(z) - sum_i w_i m_i onehot(y_i)

The loss of a batch is the sum of its row losses over the sum of its row weights.

Shape letters: V vocabulary, S bag size; ``...`` any leading shape, the same in all arguments.
"""

from torch import Tensor


def target_weights(targets: Tensor, weights: Tensor, ignore_index: int = -100) -> Tensor:
    """Return w_i m_i, each target's weight, zero where it is ignored.

    Args:
        targets: ``[..., S]`` integers.
        weights: ``[S]`` float32.
        ignore_index: the target that carries neither loss nor gradient.

    Returns:
        ``[..., S]`` float32; its sum over the last axis is the row weight omega.
    """
    return weights * (targets != ignore_index)


def target_coefficients(columns: Tensor, weights: Tensor) -> Tensor:
    """Return c_i, the summed weight of all targets of the row that share target i's column.

    The gradient in that column is then ``omega p_i - c_i``, one value however often the column repeats, so it
    can be written instead of added: the order of the writes does not matter.

    Args:
        columns: ``[..., S]`` integers.
        weights: ``[..., S]`` float32, zero for targets that do not count.

    Returns:
        ``[..., S]`` float32.
    """
    same_column = columns.unsqueeze(-1) == columns.unsqueeze(-2)
    return (same_column * weights.unsqueeze(-2)).sum(dim=-1)


def multi_hot_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Compute the multi-hot cross-entropy of each row on one rank: the reference, differentiable.

    Args:
        logits: ``[..., V]`` of any floating dtype; computed in float32 unless float64.
        targets: ``[..., S]`` integers in 0 .. V-1, or ``ignore_index``.
        weights: ``[S]`` float32 bag weights.
        ignore_index: marks targets that carry neither loss nor gradient.

    Returns:
        ``(row_loss, row_weight)``, both ``[...]``: nats per position (the form without the constant -log S),
        and the sum of the weights of the row's valid targets.
    """
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    weight_of_target = target_weights(targets, weights, ignore_index)
    log_normaliser = logits.logsumexp(dim=-1, keepdim=True)
    logit_of_target = logits.gather(-1, targets.clamp(min=0))
    # An ignored target must not turn an infinite logit into 0 * inf.
    cross_entropy = (log_normaliser - logit_of_target).masked_fill(weight_of_target == 0, 0.0)
    row_loss = (weight_of_target * cross_entropy).sum(dim=-1)
    return row_loss, weight_of_target.sum(dim=-1)
