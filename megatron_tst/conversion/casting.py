"""Weights on their way to another type: what does not fit is refused, what is not a number is remembered."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_tst.config import UserError


@dataclass
class Casting:
    """Turns weights into one type, or leaves each its own.

    Attributes:
        dtype: of the result; each weight's own where None.
        not_finite: names of the weights that came with NaN or infinity.
        rounded: whether any weight was stored in a type that the result cannot hold exactly.
    """

    dtype: torch.dtype | None
    not_finite: list[str] = field(default_factory=list)
    rounded: bool = False

    def __call__(self, name: str, weight: Tensor, default: torch.dtype) -> Tensor:
        """Cast one weight.

        Args:
            name: of the weight, for messages.
            weight: of any floating-point type.
            default: its type where none is asked for.

        Raises:
            UserError: if a finite value becomes infinite.
        """
        cast = weight.to(self.dtype or default)
        self.rounded |= torch.promote_types(weight.dtype, cast.dtype) != cast.dtype
        largest = _largest(weight)
        if not math.isfinite(largest):
            self.not_finite.append(name)
        elif not math.isfinite(_largest(cast)):
            limit = torch.finfo(cast.dtype).max
            raise UserError(
                f"{name}: holds {largest:.4g}, but {cast.dtype} ends at {limit:.4g}; choose another --dtype"
            )
        return cast


def _largest(weight: Tensor) -> float:
    """Return the largest absolute value, NaN if one is NaN; without a temporary copy of the weight."""
    low, high = torch.aminmax(weight)
    return float(torch.maximum(-low, high))
