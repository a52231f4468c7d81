"""Casts weights to another type; overflow is an error, and values that are not finite are recorded."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_tst.config import UserError


@dataclass
class Casting:
    """Casts weights to one type, or keeps each weight's own type.

    Attributes:
        dtype: type of the result; None keeps each weight's own type.
        not_finite: names of the weights that hold NaN or infinity.
        rounded: whether any weight was stored in a type that the result cannot hold exactly.
    """

    dtype: torch.dtype | None
    not_finite: list[str] = field(default_factory=list)
    rounded: bool = False

    def __call__(self, name: str, weight: Tensor, default: torch.dtype) -> Tensor:
        """Cast one weight.

        Args:
            name: name of the weight, for messages.
            weight: weight of any floating-point type.
            default: type of the result if ``dtype`` is None.

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
                f"{name}: holds {largest:.4g}, but the largest {cast.dtype} is {limit:.4g}; choose another --dtype"
            )
        return cast


def _largest(weight: Tensor) -> float:
    """Return the largest absolute value, or NaN if a value is NaN, without a temporary copy of the weight."""
    low, high = torch.aminmax(weight)
    return float(torch.maximum(-low, high))
