"""torch's norms with the attribute ``sequence_parallel`` on their parameters.

With sequence parallelism each rank sees only its slice of the sequence, so the gradients of the parameters must be
summed over the tensor-parallel group. The attribute makes megatron-core do so; its own torch norm does not set it and
refuses sequence parallelism.
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
