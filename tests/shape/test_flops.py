import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_tst.config import ModelSettings
from megatron_tst.shape import forward_flops_per_sequence, resolve_shape, step_flops
from megatron_tst.shape.flops import peak_tflops
from megatron_tst.superposition import fold_labels, fold_tokens
from tests.model.small import DENSE, GPT2, LENGTH, MOE, VOCAB, small_model


def counted(shape, bag_size, backward=False):
    """Return torch's FLOP count per sequence, in which attention counts all pairs of positions, not the causal half."""
    model, text = small_model(shape), torch.randint(0, VOCAB, (1, LENGTH * bag_size + 1))
    bags, targets = fold_tokens(text[:, :-1], bag_size), fold_labels(text[:, 1:], bag_size)
    # Of torch's attention kernels for the CPU, the counter supports only the plain one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(bags, torch.arange(LENGTH).unsqueeze(0), None, labels=targets)
        if backward:
            loss.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [DENSE, MOE, GPT2], ids=["dense", "moe", "gpt2"])
def test_formula_equals_torchs_count_with_causal_attention(rank, shape):
    settings = ModelSettings(**shape)
    all_pairs, causal_pairs = LENGTH * LENGTH, LENGTH * (LENGTH + 1) // 2
    attention = settings.num_layers * 4 * settings.hidden_size * (all_pairs - causal_pairs)
    formula = forward_flops_per_sequence(resolve_shape(settings, VOCAB))
    assert formula == counted(shape, 1) - attention
    assert formula != forward_flops_per_sequence(resolve_shape(settings, VOCAB + 1))


@pytest.mark.parametrize("bag_size", [2, 4, 16])
def test_superposed_step_costs_as_much_as_an_ordinary_one(rank, bag_size):
    assert counted(DENSE, bag_size, backward=True) == counted(DENSE, 1, backward=True)


def test_step_costs_three_forward_passes_over_the_batch(rank):
    shape = resolve_shape(ModelSettings(**DENSE), VOCAB)
    assert step_flops(shape, 8) == 3 * 8 * forward_flops_per_sequence(shape)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peak_is_found_by_the_name_of_the_gpu(name, peak):
    assert peak_tflops(name) == peak
