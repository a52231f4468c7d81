"""torch's norms with the mark that sequence parallelism needs.

megatron-core's own torch norm refuses sequence parallelism, because each rank then sees only its slice of the
sequence and the weight's gradient must be summed over the tensor-parallel group: the mark asks for that.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm over the last axis."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Build the norm; further arguments of megatron-core's norms have no meaning here."""
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(torch.nn.LayerNorm):
    """Mean-and-variance norm over the last axis."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Build the norm; further arguments of megatron-core's norms have no meaning here."""
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
