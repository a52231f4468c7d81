"""Core attention through torch's scaled_dot_product_attention, which does not store the score matrix.

Shape letters: L positions, P = L / cp of them on this context-parallel rank, B sequences, H local query heads, K local
key-value heads, E head width.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


class ScaledDotProductAttention(torch.nn.Module):
    """Causal attention with the interface of megatron-core's ``DotProductAttention``; it has no parameters.

    With context parallelism each rank gathers the keys and values of the whole sequence, so their memory on every rank
    is proportional to L, not to L / cp as in Transformer Engine's ring. Queries and scores stay distributed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        """Store the settings of the attention; only causal self-attention is supported."""
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        self.cp_group = pg_collection.cp
        self.sequence_parallel = config.sequence_parallel
        self.dropout = config.attention_dropout
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """Attend from each position to itself and to the positions before it.

        Collective: every rank of the context-parallel group calls it, with its part of the sequence.

        Args:
            query: ``[P, B, H, E]``.
            key: ``[P, B, K, E]``, K a divisor of H.
            value: ``[P, B, K, E]``.
            attention_mask: must be None, since the only mask is the causal one.

        Returns:
            ``[P, B, H E]``.
        """
        assert attention_mask is None
        if self.dropout == 0.0 or not self.training or self.sequence_parallel:
            return self.attend_in_context(query, key, value)
        # Heads are split over tensor-parallel ranks, so each rank draws its own dropout.
        with get_cuda_rng_tracker().fork():
            return self.attend_in_context(query, key, value)

    def attend_in_context(self, query_PBHE: Tensor, key_PBKE: Tensor, value_PBKE: Tensor) -> Tensor:
        """Attend to the keys of the whole sequence of the context-parallel group."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size == 1:
            return self.attend(query_PBHE, key_PBKE, value_PBKE)
        # The backward pass sums the gradients of all ranks' queries and returns each rank its part.
        both = gather_from_sequence_parallel_region(torch.cat((key_PBKE, value_PBKE), dim=-1), group=self.cp_group)
        key_LBKE, value_LBKE = in_text_order(both, size).chunk(2, dim=-1)
        # Each of this rank's two chunks sees the sequence up to its own end; together they cost the same on every rank.
        length = query_PBHE.shape[0] // 2
        ends = ((rank + 1) * length, (2 * size - rank) * length)
        parts = zip(query_PBHE.chunk(2), ends, strict=True)
        return torch.cat([self.attend(chunk, key_LBKE[:end], value_LBKE[:end]) for chunk, end in parts])

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from queries ``[Q, B, H, E]``, the last Q of T positions, to keys and values ``[T, B, K, E]``."""
        # torch cannot build the mask object in every mode (such as one that counts FLOPs); a square mask needs none.
        is_square = query.shape[0] == key.shape[0]
        context = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=None if is_square else causal_lower_right(query.shape[0], key.shape[0]),
            is_causal=is_square,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def in_text_order(gathered: Tensor, cp_size: int) -> Tensor:
    """Put a sequence gathered over context-parallel ranks back into the order of the text.

    Args:
        gathered: ``[L, ...]``, the ranks' parts one after another; rank r holds chunks r and 2 cp - 1 - r of 2 cp.
        cp_size: number of context-parallel ranks.

    Returns:
        ``[L, ...]``.
    """
    first, second = gathered.unflatten(0, (cp_size, 2, -1)).unbind(1)
    return torch.cat((first.flatten(0, 1), second.flip(0).flatten(0, 1)))
