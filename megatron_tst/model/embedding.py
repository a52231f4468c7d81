"""Embedding of bags: the mean of each bag's token embeddings, summed within the shard and reduced once over the ranks.

Shape letters: B sequences, L positions, S bag size, N = B L bags, D hidden, Vp local vocabulary.
"""

from typing import Any, cast

import torch
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor


class _BagSum(torch.autograd.Function):
    """Sum the embeddings of each bag's tokens that are in this shard; both passes accumulate in float32.

    Each pass handles one place of the bag at a time, so neither holds a tensor of all tokens' embeddings.
    """

    @staticmethod
    def forward(ctx: Any, weight_VpD: Tensor, rows_NS: Tensor, is_whole: bool) -> Tensor:
        """Return ``[N, D]`` float32; rows below 0 or from Vp on belong to other shards and add nothing.

        ``is_whole`` states that there are no other shards, which saves a masking pass over each place's embeddings.
        """
        num_rows = weight_VpD.shape[0]
        sum_ND = weight_VpD.new_zeros(rows_NS.shape[0], weight_VpD.shape[1], dtype=torch.float32)
        if is_whole:
            for rows_N in rows_NS.unbind(1):
                sum_ND += weight_VpD.index_select(0, rows_N)
        else:
            outside_NS = (rows_NS < 0) | (rows_NS >= num_rows)
            for rows_N, outside_N in zip(rows_NS.unbind(1), outside_NS.unbind(1), strict=True):
                term_ND = weight_VpD.index_select(0, rows_N.masked_fill(outside_N, 0))
                sum_ND += term_ND.masked_fill_(outside_N.unsqueeze(1), 0.0)
            # An extra row after the shard's last one collects the gradient of the tokens outside the shard.
            rows_NS = rows_NS.masked_fill(outside_NS, num_rows)
        ctx.save_for_backward(rows_NS)
        ctx.weight_shape, ctx.weight_dtype = weight_VpD.shape, weight_VpD.dtype
        return sum_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        """Return the shard's gradient, ``[Vp, D]`` in the weight's dtype: the float32 sum, rounded once."""
        (rows_NS,) = ctx.saved_tensors
        num_rows, width = ctx.weight_shape
        grad_weight = grad_ND.new_zeros(num_rows + 1, width)
        for rows_N in rows_NS.unbind(1):
            # On CUDA this adds with atomics in an arbitrary order; in deterministic mode torch sorts the rows instead.
            grad_weight.index_add_(0, rows_N, grad_ND)
        return grad_weight[:num_rows].to(ctx.weight_dtype), None, None


class VocabParallelBagEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """megatron-core's vocabulary-parallel embedding that also takes bags of tokens.

    Tokens ``[B, L]`` are embedded by megatron-core. Bags ``[B, L, S]`` become the means of their tokens' embeddings in
    the same layout: ``[B, L, D]``, or ``[L / tp, B, D]`` if the embedding is reduce-scattered for sequence
    parallelism. Collective: with tensor parallelism every rank of the group calls it.
    """

    def forward(self, input_: Tensor) -> Tensor:
        """Embed tokens ``[B, L]`` or bags ``[B, L, S]``."""
        if input_.dim() == 2:
            return cast(Tensor, super().forward(input_))
        batch, positions, bag_size = input_.shape
        rows_NS = input_.reshape(-1, bag_size) - self.vocab_start_index
        sum_ND = _BagSum.apply(self.weight, rows_NS, self.tp_group.size() == 1)
        sum_BLD = cast(Tensor, sum_ND).view(batch, positions, -1)
        # The ranks' partial sums are added in float32, so the mean is rounded once at any tensor-parallel size.
        if self.reduce_scatter_embeddings:
            sum_LBD = sum_BLD.transpose(0, 1).contiguous()
            reduced = reduce_scatter_to_sequence_parallel_region(sum_LBD, group=self.tp_group)
        else:
            reduced = reduce_from_tensor_model_parallel_region(sum_BLD, group=self.tp_group)
        return cast(Tensor, (reduced / bag_size).to(self.weight.dtype))
