"""One test per stand-in, so that an incompatible megatron-core or torch fails here under the stand-in's name."""

import inspect

import numpy
import pytest
import torch

from megatron_tst.distributed import enter_device
from megatron_tst.megatron_patches import cpu
from megatron_tst.megatron_patches.cpu import CPU, STAND_INS, CudaMeansCpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stand-in is for machines without CUDA")


@pytest.fixture(scope="module", autouse=True)
def entered():
    return enter_device()


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, n, _ in STAND_INS], ids=[n for _, n, _ in STAND_INS])
def test_every_stand_in_is_in_place_and_still_needed(module, name):
    stand_in = next(s for m, n, s in STAND_INS if (m, n) == (module, name))
    assert getattr(module, name) is stand_in
    if name != "te_general_gemm":
        assert name in inspect.getsource(module) or hasattr(torch.cuda, name)


def test_device_is_entered_only_once(entered):
    assert enter_device() is entered
    assert entered.backend == "gloo"
    assert entered.torch_device == CPU


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_cuda_devices_are_replaced_by_the_cpu(device):
    assert torch.zeros(2, device=device).device == CPU
    assert torch.zeros(2).to(device).device == CPU
    assert torch.zeros(2).cuda().device == CPU


def test_cuda_device_fails_without_the_mode():
    with torch._C.DisableTorchFunction(), pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


def test_host_memory_is_not_pinned():
    assert not torch.tensor([1], pin_memory=True).is_pinned()
    with torch._C.DisableTorchFunction(), pytest.raises(RuntimeError, match=r"pin|NVIDIA driver"):
        torch.tensor([1], pin_memory=True)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "FloatTensor"), (torch.bfloat16, "BFloat16Tensor"), (torch.float16, "HalfTensor")],
)
def test_tensor_types_have_the_names_that_the_optimizers_expect(dtype, name):
    assert torch.zeros(1, dtype=dtype).type() == f"torch.cuda.{name}"
    assert torch.zeros(1).type(dtype).dtype == dtype


def test_streams_and_events_are_idle():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    stream.record_event().synchronize()
    torch.cuda.default_stream().synchronize()
    torch.cuda.Event(enable_timing=True).record()
    torch.zeros(1).record_stream(stream)
    with torch.cuda.stream(stream):
        torch.cuda.synchronize()
    torch.cuda.set_device(0)
    torch.cuda.empty_cache()


def test_cuda_generator_is_the_cpu_generator():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert not torch.equal(torch.rand(3), first)


def test_rng_tracker_forks_and_restores_the_generator(rank, caplog):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with get_cuda_rng_tracker().fork():
        first = torch.rand(2)
    with get_cuda_rng_tracker().fork():
        second = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    assert not torch.equal(first, second)
    assert not caplog.records


def test_split_sizes_become_numpy():
    from megatron.core.transformer.moe import token_dispatcher

    sizes = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    assert isinstance(sizes, numpy.ndarray)
    kept = torch.tensor([1])
    assert token_dispatcher.maybe_move_tensor_to_cpu(kept) is kept


def test_mode_is_defined_in_one_module():
    assert CudaMeansCpu.__module__ == cpu.__name__
