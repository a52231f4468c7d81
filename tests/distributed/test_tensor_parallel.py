"""Embedding and loss over tensor-parallel ranks: values, gradients and collectives."""

import pytest
import torch

from megatron_tst.distributed import ParallelSizes, init_parallel_state, seed_everything
from megatron_tst.model import vocab_parallel_multi_hot_cross_entropy
from megatron_tst.superposition import bag_weights
from tests.distributed.launch import run_distributed
from tests.model.small import DENSE, LENGTH, VOCAB
from tests.ops import OperationLog
from tests.reference import edge_targets, loss_and_gradient

pytestmark = pytest.mark.distributed

WORLD = 2
COLLECTIVES = ("allreduce_", "_reduce_scatter_base_", "allgather_", "_allgather_base_", "broadcast_", "alltoall_base_")


def collectives(log: OperationLog) -> dict[str, int]:
    return {name: log.counts[name] for name in COLLECTIVES if log.counts[name]}


def lose(logits_LBV, targets, weights):
    ranks = init_parallel_state(ParallelSizes(tensor_model_parallel_size=WORLD))
    columns = logits_LBV.shape[-1] // ranks.tp_size
    mine = logits_LBV[..., ranks.tp_rank * columns : (ranks.tp_rank + 1) * columns].clone().requires_grad_()
    with OperationLog() as forward:
        loss, weight = vocab_parallel_multi_hot_cross_entropy(mine, targets, weights, ranks.groups.tp)
    with OperationLog() as backward:
        loss.sum().backward()
    return loss.detach(), weight, mine.grad, collectives(forward), collectives(backward)


@pytest.mark.parametrize("bag_size", [1, 2, 6, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_loss_over_two_shards_equals_the_loop_over_targets(bag_size, dtype, tolerance):
    vocab = 40
    logits = (4 * torch.randn(6, 2, vocab, generator=torch.Generator().manual_seed(1))).to(dtype)
    targets, weights = edge_targets((2, 6), vocab, bag_size), bag_weights("power_law", bag_size)
    ranks = run_distributed(lose, WORLD, logits, targets, weights)
    wanted_loss, wanted_weight, wanted_gradient = loss_and_gradient(logits.transpose(0, 1), targets, weights)
    for loss, weight, _, forward, backward in ranks:
        torch.testing.assert_close(loss.double(), wanted_loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(weight.double(), wanted_weight, rtol=1e-6, atol=1e-7)
        # One gathering of maxima, sums and target logits; none in the backward pass, whatever the bag size.
        assert (forward, backward) == ({"allgather_": 1}, {})
    gradient = torch.cat([rank[2] for rank in ranks], dim=-1).transpose(0, 1)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=tolerance, atol=1e-6)


def embed(shape, sequence_parallel, bf16, bags, weight, upstream):
    from megatron_tst.config import ModelSettings, ParallelSettings, TrainingSettings
    from megatron_tst.megatron_patches import find_libraries
    from megatron_tst.model import LossChoice, build_gpt, transformer_config
    from megatron_tst.shape import resolve_shape

    ranks = init_parallel_state(ParallelSizes(tensor_model_parallel_size=WORLD))
    seed_everything(1)
    model = ModelSettings(**shape)
    parallel = ParallelSettings(tensor_model_parallel_size=WORLD, sequence_parallel=sequence_parallel)
    sizes = resolve_shape(model, VOCAB + 1, parallel)
    config = transformer_config(model, sizes, TrainingSettings(bf16=bf16), parallel, find_libraries())
    embedding = build_gpt(config, model, sizes, LossChoice(), use_transformer_engine=False).embedding
    words, rows = embedding.word_embeddings, (VOCAB + 1) // WORLD
    # With overlapped gathering, hooks fill the weight, which must not be read before they run.
    words.weight.data.fill_(torch.nan)

    def gather(module, _):
        module.weight.data.copy_(weight[ranks.tp_rank * rows : (ranks.tp_rank + 1) * rows])

    words.register_forward_pre_hook(gather)
    with OperationLog() as log:
        result = embedding(bags, torch.arange(LENGTH).expand(len(bags), -1))
    part = upstream.chunk(WORLD)[ranks.tp_rank] if sequence_parallel else upstream
    result.backward(part.to(result.dtype))
    return result.detach(), words.weight.grad, collectives(log)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bag_size", [2, 6])
def test_bags_over_two_shards_are_reduced_once(bag_size, bf16, sequence_parallel):
    generator = torch.Generator().manual_seed(2)
    bags = torch.randint(0, VOCAB, (3, LENGTH, bag_size), generator=generator)
    weight = torch.randn(VOCAB + 1, 32, generator=generator)
    upstream = torch.randn(LENGTH, 3, 32, generator=generator)
    if bf16:
        weight, upstream = weight.bfloat16().float(), upstream.bfloat16().float()
    ranks = run_distributed(embed, WORLD, DENSE, sequence_parallel, bf16, bags, weight, upstream)
    leaf = weight.double().requires_grad_()
    wanted = leaf[bags].mean(dim=2).transpose(0, 1)
    wanted.backward(upstream.double())
    result = torch.cat([rank[0] for rank in ranks]) if sequence_parallel else ranks[0][0]
    tolerance = {"rtol": 2**-8, "atol": 1e-3} if bf16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(result.double(), wanted.detach(), **tolerance)
    gradient = torch.cat([rank[1] for rank in ranks])
    torch.testing.assert_close(gradient.double(), leaf.grad, **tolerance)
    once = "_reduce_scatter_base_" if sequence_parallel else "allreduce_"
    assert all(rank[2] == {once: 1} for rank in ranks)


def embed_unreduced(*arguments):
    from megatron_tst.model import embedding

    embedding.reduce_from_tensor_model_parallel_region = lambda tensor, group: tensor
    return embed(*arguments)


def test_missing_reduction_changes_the_embedding():
    bags = torch.randint(0, VOCAB, (3, LENGTH, 4))
    weight, upstream = torch.randn(VOCAB + 1, 32), torch.randn(LENGTH, 3, 32)
    ranks = run_distributed(embed_unreduced, WORLD, DENSE, False, False, bags, weight, upstream)
    assert (ranks[0][0].double() - weight.double()[bags].mean(2).transpose(0, 1)).abs().max() > 0.1
    assert not any(rank[2] for rank in ranks)
