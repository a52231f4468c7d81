"""The device, its random generators, and every collective of a run with a single rank."""

import importlib.metadata
import importlib.util

import pytest
import torch
import torch.distributed as dist

from megatron_tst.distributed import any_rank, enter_device, every_rank, run_on_main_rank
from megatron_tst.distributed.device import driver_version, peak_memory_bytes
from megatron_tst.distributed.rng_state import get_rng_states, set_rng_states
from megatron_tst.megatron_patches import find_libraries


def test_the_device_can_be_used(device, record_property):
    entered = enter_device()
    record_property("device", entered.name)
    for name in ("torch", "megatron-core", "triton", "numpy"):
        has_it = importlib.util.find_spec(name.replace("-core", "")) is not None
        record_property(name, importlib.metadata.version(name) if has_it else "none")
    record_property("Transformer Engine", find_libraries().transformer_engine or "none")
    if device.type == "cuda":
        record_property("CUDA", torch.version.cuda)
        record_property("driver", driver_version())
        record_property("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        assert (entered.backend, device.index) == ("nccl", torch.cuda.current_device())
        assert torch.zeros(1, device="cuda").device == device
    before = peak_memory_bytes()
    torch.ones(1 << 26, device=device).sum().item()
    assert peak_memory_bytes() >= max(before, 1 << 28 if device.type == "cuda" else 0)


def test_rng_state_can_be_restored(rank, device):
    torch.rand(3, device=device)
    states = get_rng_states()
    first = torch.rand(3, device=device)
    set_rng_states(states)
    assert torch.equal(torch.rand(3, device=device), first)
    assert not torch.equal(torch.rand(3, device=device), first)


@pytest.mark.filterwarnings(
    "ignore:.* is deprecated:FutureWarning"
)  # megatron-core calls functions that torch has renamed
def test_collectives_work_with_one_rank(rank, device):
    group = rank.groups.dp_cp
    assert dist.get_backend(group) == enter_device().backend
    values = torch.arange(8.0, device=device)
    reduced, scattered, gathered = values.clone(), torch.zeros_like(values), torch.zeros_like(values)
    dist.all_reduce(reduced, group=group)
    dist.reduce_scatter_tensor(scattered, values, group=group)
    dist.all_gather_into_tensor(gathered, values, group=group)
    dist.broadcast(values, 0, group=group)
    assert all(
        torch.equal(result, torch.arange(8.0, device=device)) for result in (reduced, scattered, gathered, values)
    )
    assert run_on_main_rank(lambda: "said") == "said"
    assert every_rank({"rank": 0}) == [{"rank": 0}]
    assert any_rank(True, False) == [True, False]
