"""The multi-hot cross-entropy (MCE): the arithmetic that all implementations share, and the reference implementation.

For one row of logits z with targets y_i, bag weights w_i and validity m_i::

    row loss   l     = sum_i w_i m_i CE(z, y_i),   CE(z, y) = logsumexp(z) - z_y
    row weight omega = sum_i w_i m_i
    gradient   dl/dz = omega softmax(z) - sum_i w_i m_i onehot(y_i)

The loss of a batch is the sum of its row losses over the sum of its row weights.

Shape letters: V vocabulary, S bag size; ``...`` stands for any leading shape, the same in all arguments.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# (cross-entropy of each target [..., S], targets [..., S], weights w_i m_i [..., S], validity [..., S])
# -> (row loss [...], row weight omega [...], coefficients a_i [..., S]); the gradient of the row loss is
# omega softmax(z) - sum_i a_i onehot(y_i).
Objective = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def multi_hot(
    cross_entropy: Tensor, targets: Tensor, weights: Tensor, is_valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """MCE: the weighted mean of the targets' cross-entropies; an :data:`Objective`."""
    # A target without weight must not turn an infinite logit into 0 * inf.
    row_loss = (weights * cross_entropy.masked_fill(weights == 0, 0.0)).sum(dim=-1)
    return row_loss, weights.sum(dim=-1), weights


def bag_mass(
    cross_entropy: Tensor, targets: Tensor, weights: Tensor, is_valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """MCEAlt: minus the logarithm of the total probability of the bag's distinct tokens; an :data:`Objective`.

    Bag weights have no effect; the weight of a row with any valid target is 1.
    """
    places = range(targets.shape[-1])
    repeats = [(targets[..., :i] == targets[..., i : i + 1]).any(dim=-1) for i in places]
    is_counted = is_valid & ~torch.stack(repeats, dim=-1)
    row_weight = is_valid.any(dim=-1).to(cross_entropy.dtype)
    log_probability = (-cross_entropy).masked_fill(~is_counted, -torch.inf)
    log_mass = log_probability.logsumexp(dim=-1).masked_fill(row_weight == 0, 0.0)
    return -log_mass, row_weight, torch.exp(log_probability - log_mass.unsqueeze(-1))


def row_weights(objective: str, targets: Tensor, weights: Tensor, ignore_index: int = -100) -> Tensor:
    """Return each row's weight omega under an objective; it does not depend on the logits.

    Args:
        objective: ``mce`` or ``mce_alt``.
        targets: ``[..., S]`` integers.
        weights: ``[S]`` float32.
        ignore_index: value of targets that contribute neither loss nor gradient.

    Returns:
        ``[...]`` float32.
    """
    if objective == "mce_alt":
        return (targets != ignore_index).any(dim=-1).float()
    return target_weights(targets, weights, ignore_index).sum(dim=-1)


OBJECTIVES: dict[str, Objective] = {"mce": multi_hot, "mce_alt": bag_mass}


def target_weights(targets: Tensor, weights: Tensor, ignore_index: int = -100) -> Tensor:
    """Return w_i m_i: the weight of each target, which is zero for ignored targets.

    Args:
        targets: ``[..., S]`` integers.
        weights: ``[S]`` float32.
        ignore_index: value of targets that contribute neither loss nor gradient.

    Returns:
        ``[..., S]`` float32; its sum over the last axis is the row weight omega.
    """
    return weights * (targets != ignore_index)


def target_coefficients(columns: Tensor, weights: Tensor) -> Tensor:
    """Return c_i: the summed weight of all targets in the row that have the same column as target i.

    The gradient in that column is then ``omega p_i - c_i``, however often the column repeats. It can therefore be
    written instead of added, and the order of the writes does not matter.

    Args:
        columns: ``[..., S]`` integers.
        weights: ``[..., S]`` float32, zero for ignored targets.

    Returns:
        ``[..., S]`` float32.
    """
    same_column = columns.unsqueeze(-1) == columns.unsqueeze(-2)
    return (same_column * weights.unsqueeze(-2)).sum(dim=-1)


def multi_hot_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Compute the multi-hot cross-entropy of each row on one rank: the differentiable reference.

    Args:
        logits: ``[..., V]`` of any floating dtype; computed in float32 unless float64.
        targets: ``[..., S]`` integers in 0 .. V-1, or ``ignore_index``.
        weights: ``[S]`` float32 bag weights.
        ignore_index: value of targets that contribute neither loss nor gradient.

    Returns:
        ``(row_loss, row_weight)``, both ``[...]``: the loss in nats per position (the form without the constant
        -log S), and the sum of the weights of the row's valid targets.
    """
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    weight_of_target = target_weights(targets, weights, ignore_index)
    log_normaliser = logits.logsumexp(dim=-1, keepdim=True)
    logit_of_target = logits.gather(-1, targets.clamp(min=0))
    row_loss, row_weight, _ = multi_hot(
        log_normaliser - logit_of_target, targets, weight_of_target, targets != ignore_index
    )
    return row_loss, row_weight
