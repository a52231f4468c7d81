import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron_tst.distributed import seed_everything
from megatron_tst.model import TSTGPTModel
from megatron_tst.superposition import bag_weights, fold_labels, fold_tokens, multi_hot_cross_entropy
from tests.model.small import DENSE, GPT2, LENGTH, MOE, VOCAB, small_model


class StockGPT(GPTModel):
    """megatron-core's model, which ignores the arguments that it does not have."""

    def __init__(self, *args, real_vocab_size, loss, **kwargs):
        super().__init__(*args, **kwargs)


def text(bag_size, batch=3):
    return torch.randint(0, VOCAB, (batch, LENGTH * bag_size + 1))


def positions(batch=3):
    return torch.arange(LENGTH).expand(batch, -1)


@pytest.fixture(params=[DENSE, MOE, GPT2], ids=["dense", "moe", "gpt2"])
def pair(rank, request):
    models = []
    for model_class in (TSTGPTModel, StockGPT):
        seed_everything(7)
        models.append(small_model(request.param, model_class))
    return models


def test_bag_size_one_gives_gptmodels_losses_bitwise(pair):
    ours, stock = pair
    assert ours.state_dict().keys() == stock.state_dict().keys()
    tokens = text(1)
    losses = [model(tokens[:, :-1], positions(), None, labels=tokens[:, 1:]) for model in pair]
    assert torch.equal(*losses)
    for loss in losses:
        loss.mean().backward()
    for (name, parameter), other in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_shifted_label_changes_the_loss(pair):
    tokens = text(1)
    losses = [
        model(tokens[:, :-1], positions(), None, labels=labels)
        for model, labels in zip(pair, (tokens[:, 1:], tokens[:, :-1]), strict=True)
    ]
    assert (losses[0] - losses[1]).abs().max() > 1e-3


@pytest.mark.parametrize("weights", ["uniform", "power_law"])
def test_the_superposed_loss_equals_the_reference_on_the_models_own_logits(rank, weights):
    model, tokens = small_model(DENSE, bag_weights=weights), text(4)
    bags, targets = fold_tokens(tokens[:, :-1], 4), fold_labels(tokens[:, 1:], 4)
    loss = model(bags, positions(), None, labels=targets)
    logits = model(bags, positions(), None)
    wanted, _ = multi_hot_cross_entropy(logits, targets, bag_weights(weights, 4))
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)


def test_torch_attention_equals_megatron_cores(rank):
    model, tokens = small_model(DENSE), text(1)
    ours = model(tokens[:, :-1], positions(), None, labels=tokens[:, 1:])
    for layer in model.decoder.layers:
        attention = layer.self_attention
        attention.core_attention = DotProductAttention(
            model.config, layer.layer_number, attention.attn_mask_type, attention.attention_type
        )
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    torch.testing.assert_close(ours, model(tokens[:, :-1], positions(), mask, labels=tokens[:, 1:]))
    everything_visible = model(tokens[:, :-1], positions(), ~mask.new_ones(mask.shape), labels=tokens[:, 1:])
    assert (everything_visible - ours).abs().max() > 1e-3


def test_attention_dropout_is_random_in_training_only(rank):
    model, tokens = small_model({**DENSE, "attention_dropout": 0.5}), text(1)
    first, second = (model(tokens[:, :-1], positions(), None, labels=tokens[:, 1:]) for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    first, second = (model(tokens[:, :-1], positions(), None, labels=tokens[:, 1:]) for _ in range(2))
    assert torch.equal(first, second)
