"""Attention over the context-parallel group has the outputs and gradients of whole sequences, in float64."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_tst.distributed import ParallelSizes, init_parallel_state
from megatron_tst.model import attention
from tests.distributed.launch import run_distributed

pytestmark = pytest.mark.distributed
L, B, H, K, E = 16, 2, 4, 2, 6


def chunks_of(rank: int, cp_size: int) -> list[int]:
    """Return the positions of a rank: a chunk from the front of the text and its counterpart from the back."""
    size = L // (2 * cp_size)
    return [chunk * size + i for chunk in (rank, 2 * cp_size - 1 - rank) for i in range(size)]


def whole_attention(query, key, value):
    """Compute each position's attention to all positions up to it, one position and head at a time."""
    rows = []
    for i in range(L):
        heads = []
        for head in range(H):
            group = head // (H // K)
            scores = torch.einsum("be,tbe->bt", query[i, :, head], key[: i + 1, :, group]) / E**0.5
            heads.append(torch.einsum("bt,tbe->be", scores.softmax(-1), value[: i + 1, :, group]))
        rows.append(torch.cat(heads, dim=-1))
    return torch.stack(rows)


def attend(cp_size, inputs, upstream, broken=""):
    """Run this rank's part of the attention; return its output and gradients."""
    ranks = init_parallel_state(ParallelSizes(context_parallel_size=cp_size))
    gather = attention.gather_from_sequence_parallel_region
    if broken == "plain order":
        attention.in_text_order = lambda gathered, cp_size: gathered
    if broken == "own gradients alone":
        attention.gather_from_sequence_parallel_region = lambda part, group: gather(part, False, group)
    config = SimpleNamespace(sequence_parallel=False, attention_dropout=0.0)
    module = attention.ScaledDotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=ranks.groups)
    mine = chunks_of(ranks.cp_rank, cp_size)
    leaves = [tensor[mine].clone().requires_grad_() for tensor in inputs]
    output = module(*leaves, None)
    output.backward(upstream[mine])
    return output.detach(), *(leaf.grad for leaf in leaves)


def compare(cp_size, broken=""):
    generator = torch.Generator().manual_seed(7)
    shapes = ((L, B, H, E), (L, B, K, E), (L, B, K, E))
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    upstream = torch.randn(L, B, H * E, dtype=torch.float64, generator=generator)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = whole_attention(*leaves)
    output.backward(upstream)
    ranks = run_distributed(attend, cp_size, cp_size, inputs, upstream, broken)
    for index, wanted in enumerate([output.detach(), *(leaf.grad for leaf in leaves)]):
        found = torch.full_like(wanted, torch.nan)
        for rank, results in enumerate(ranks):
            found[chunks_of(rank, cp_size)] = results[index]
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_parts_of_a_sequence_attend_as_the_whole(cp_size):
    compare(cp_size)


@pytest.mark.parametrize("broken", ["plain order", "own gradients alone"])
def test_comparison_fails_for_wrong_gathering(broken):
    with pytest.raises(AssertionError, match="not close"):
        compare(2, broken)
