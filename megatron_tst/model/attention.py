"""Core attention through torch's scaled_dot_product_attention, which keeps no score matrix.

Shape letters: L positions, B sequences, H local query heads, K local key-value heads, E head width.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class ScaledDotProductAttention(torch.nn.Module):
    """Causal attention with the interface of megatron-core's ``DotProductAttention``; it has no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        """Keep what the call needs; only causal self-attention within one rank's sequence is offered."""
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine's attention"
        self.sequence_parallel = config.sequence_parallel
        self.dropout = config.attention_dropout
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """Attend each position to itself and those before it.

        Args:
            query: ``[L, B, H, E]``.
            key: ``[L, B, K, E]``, K a divisor of H.
            value: ``[L, B, K, E]``.
            attention_mask: must be None: causality is all there is.

        Returns:
            ``[L, B, H E]``.
        """
        assert attention_mask is None
        if self.dropout == 0.0 or not self.training or self.sequence_parallel:
            return self._attend(query, key, value)
        # Heads are split over tensor-parallel ranks, so each rank draws its own dropout.
        with get_cuda_rng_tracker().fork():
            return self._attend(query, key, value)

    def _attend(self, query_LBHE: Tensor, key_LBKE: Tensor, value_LBKE: Tensor) -> Tensor:
        context_BHLE = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.permute(1, 2, 0, 3) for tensor in (query_LBHE, key_LBKE, value_LBKE)),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query_LBHE.shape[2] != key_LBKE.shape[2],
        )
        return context_BHLE.permute(2, 0, 1, 3).flatten(2)
