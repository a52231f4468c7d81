"""Weights of the tokens of a bag in the multi-hot loss (appendix on bag weights of the paper).

Shape letters: S bag size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# The paper's fit of the mutual information between a token and the i-th token after it: C0 + a i^k, in nats.
MUTUAL_INFORMATION_FIT = (3.63, 1.35, -1.25)


def _mutual_information(rank: Tensor) -> Tensor:
    constant, factor, exponent = MUTUAL_INFORMATION_FIT
    return constant + factor * rank**exponent


BAG_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": torch.ones_like,
    "power_law": torch.reciprocal,
    "exponential": lambda rank: torch.exp(-rank),
    "first_token": lambda rank: (rank == 1).to(rank.dtype),
    "mutual_information": _mutual_information,
}


def bag_weights(name: str, bag_size: int, device: torch.device | None = None) -> Tensor:
    """Return the normalised weight of each token of a bag, in reading order.

    Args:
        name: ``uniform`` 1, ``power_law`` 1/i, ``exponential`` exp(-i), ``first_token`` (only i = 1) or
            ``mutual_information`` C0 + a i^k, for i = 1 .. S.
        bag_size: S, at least 1.
        device: device on which the weights are computed; nothing is copied from the host.

    Returns:
        ``[S]`` float32, sum 1.

    Raises:
        ValueError: if the name is unknown or ``bag_size`` is below 1.
    """
    if name not in BAG_WEIGHTS:
        raise ValueError(f"bag weights {name!r} are unknown; choose from {', '.join(BAG_WEIGHTS)}")
    if bag_size < 1:
        raise ValueError(f"bag_size is {bag_size}; it must be at least 1")
    weights = BAG_WEIGHTS[name](torch.arange(1, bag_size + 1, dtype=torch.float64, device=device))
    return (weights / weights.sum()).float()
