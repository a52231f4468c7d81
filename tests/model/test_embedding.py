import pytest
import torch

from megatron_tst.superposition import fold_tokens
from tests.model.small import DENSE, GPT2, LENGTH, VOCAB, small_model
from tests.ops import OperationLog


def bags(bag_size, batch=3):
    return fold_tokens(torch.randint(0, VOCAB, (batch, LENGTH * bag_size)), bag_size)


def positions(batch=3):
    return torch.arange(LENGTH).expand(batch, -1)


def means(weight, bags_BLS):
    """Return the means of the tokens' embeddings in float64, with positions first, as the decoder takes them."""
    return torch.stack([torch.stack([weight.double()[bag].mean(0) for bag in row]) for row in bags_BLS]).transpose(0, 1)


@pytest.mark.parametrize("bag_size", [2, 6])
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-6), (True, 2**-8)])
def test_the_embedding_of_a_bag_is_the_mean_of_its_tokens(rank, bag_size, bf16, tolerance):
    embedding = small_model(DENSE, bf16=bf16).embedding
    tokens = bags(bag_size)
    result = embedding(tokens, positions())
    wanted = means(embedding.word_embeddings.weight.detach(), tokens)
    torch.testing.assert_close(result.double(), wanted, rtol=tolerance, atol=1e-8)
    # Negative control: counting the first token twice is far outside the tolerance.
    wrong = means(embedding.word_embeddings.weight.detach(), torch.cat((tokens, tokens[..., :1]), dim=-1))
    assert (wrong - wanted).abs().max() > 100 * (result.double() - wanted).abs().max()


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def mode(request):
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-6), (True, 2**-8)])
def test_the_gradient_is_summed_in_float32_and_rounded_once(rank, mode, bf16, tolerance):
    embedding = small_model(DENSE, bf16=bf16).embedding.word_embeddings
    tokens = torch.randint(0, 3, (3, LENGTH, 6))  # few tokens: each row collects many gradients
    upstream = torch.randn(3, LENGTH, 32).to(embedding.weight.dtype)
    embedding(tokens).backward(upstream)
    wanted = torch.zeros(VOCAB, 32, dtype=torch.float64)
    for bag, gradient in zip(tokens.view(-1, 6), upstream.double().view(-1, 32), strict=True):
        for token in bag:
            wanted[token] += gradient / 6
    torch.testing.assert_close(embedding.weight.grad.double(), wanted, rtol=tolerance, atol=1e-6)
    first, embedding.weight.grad = embedding.weight.grad, None
    embedding(tokens).backward(upstream)
    assert torch.equal(embedding.weight.grad, first)


def test_no_tensor_holds_all_tokens_embeddings(rank):
    bag_size, batch = 32, 3
    embedding = small_model(DENSE).embedding
    with OperationLog() as log:
        embedding(bags(bag_size), positions()).sum().backward()
    all_tokens = batch * LENGTH * bag_size * 32
    assert log.largest < all_tokens / 4
    with OperationLog() as naive:
        embedding.word_embeddings.weight[bags(bag_size)].mean(dim=2)
    assert naive.largest >= all_tokens


def test_positions_dropout_and_fp32_residual_are_kept(rank):
    model = small_model({**GPT2, "hidden_dropout": 0.5})
    embedding, tokens = model.embedding, bags(4)
    embedding.eval()
    table = embedding.position_embeddings.weight.detach()
    wanted = means(embedding.word_embeddings.weight.detach(), tokens) + table[:LENGTH, None].double()
    torch.testing.assert_close(embedding(tokens, positions()).double(), wanted, rtol=1e-5, atol=1e-6)
    embedding.train()
    dropped = embedding(tokens, positions()) == 0
    assert 0.3 < dropped.float().mean() < 0.7
    half = small_model(DENSE, bf16=True)
    half.config.fp32_residual_connection = True
    assert half.embedding(tokens, positions()).dtype == torch.float32


def test_the_embedding_of_tokens_is_the_stock_one(rank):
    embedding = small_model(DENSE).embedding
    tokens = bags(1).squeeze(-1)
    stock = torch.nn.functional.embedding(tokens, embedding.word_embeddings.weight).transpose(0, 1)
    assert torch.equal(embedding(tokens, positions()), stock)
