"""The CPU as a platform for megatron-core, whose code names ``"cuda"`` and ``torch.cuda`` instead of "the device".

This file contains everything that makes megatron-core run without a GPU, each entry with its reason.
:func:`megatron_tst.distributed.enter_device` applies it once at startup.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class CudaMeansCpu(TorchFunctionMode):
    """Replaces every "cuda" device that is passed to a torch function by "cpu"."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` with its device on the CPU."""
        kwargs = kwargs or {}
        # The pipeline schedules contain literals such as torch.zeros([], device="cuda").
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        # megatron-core pins host memory for copies to a GPU, such as the rotary embedding's context-parallel chunks.
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if func is torch.Tensor.cuda:
            return args[0]
        # The mixed-precision and distributed optimizers recognise dtypes by the name of the CUDA tensor type.
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        # The caching allocator's stream bookkeeping has no CPU counterpart.
        if func is torch.Tensor.record_stream:
            return None
        return func(*args, **kwargs)


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class IdleStream:
    """A CUDA stream or event that never has anything to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Accept and ignore the arguments of a stream or event."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a method that does nothing and returns this object, for wait_stream, record_event and all others."""
        return _returning(self)


def _returning(value: Any) -> Callable[..., Any]:
    """Return a new function each time: torch.compile accepts no function under two names of ``torch.cuda``."""

    def stand_in(*_: Any, **__: Any) -> Any:
        """Ignore the arguments."""
        return value

    return stand_in


@contextlib.contextmanager
def _stream_context(_: object) -> Iterator[None]:
    yield


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _split_sizes_to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Convert split sizes to numpy even if they are on the CPU already (the original requires ``is_cuda``)."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


# (module, name, stand-in): the names that megatron-core uses in a training step.
STAND_INS: tuple[tuple[Any, str, Any], ...] = (
    (torch.cuda, "current_device", _returning(CPU)),
    (torch.cuda, "set_device", _returning(None)),
    (torch.cuda, "synchronize", _returning(None)),
    (torch.cuda, "empty_cache", _returning(None)),
    (torch.cuda, "manual_seed", _manual_seed),
    (torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
    (torch.cuda, "set_rng_state", lambda new_state, *_, **__: torch.set_rng_state(new_state)),
    (torch.cuda, "Stream", IdleStream),
    (torch.cuda, "Event", IdleStream),
    (torch.cuda, "stream", _stream_context),
    (torch.cuda, "current_stream", _returning(IdleStream())),
    (torch.cuda, "default_stream", _returning(IdleStream())),
    # The RNG tracker of dropout and initialisation stores the state of "the CUDA generator", which is the CPU's here.
    (megatron_random, "_get_cuda_rng_state", _get_rng_state),
    (megatron_random, "_set_cuda_rng_state", _set_rng_state),
    # The alltoall dispatcher passes split sizes to torch.distributed, which needs them as host numbers.
    (token_dispatcher, "maybe_move_tensor_to_cpu", _split_sizes_to_numpy),
    # The router reads this name whether or not Transformer Engine, which defines it, could be imported.
    (moe_utils, "te_general_gemm", None),
)


def _is_not_about_shared_generator(record: logging.LogRecord) -> bool:
    # Forking "the CUDA generator" changes the CPU's here because they are the same; the fork restores it.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def enter_cpu() -> None:
    """Make megatron-core run on the CPU for the rest of this process; every rank calls it, before any model."""
    for module, name, stand_in in STAND_INS:
        setattr(module, name, stand_in)
    logging.getLogger(megatron_random.__name__).addFilter(_is_not_about_shared_generator)
    CudaMeansCpu().__enter__()


# (name in torch.cuda, answer): what Megatron-LM's trainer asks a card, beside what a model does.
CARD_ANSWERS: tuple[tuple[str, Any], ...] = (
    ("device_count", 1),
    ("get_device_capability", (9, 0)),
    ("get_device_properties", SimpleNamespace(major=9, minor=0)),
    ("memory_stats", {}),
    ("memory_allocated", 0),
    ("max_memory_allocated", 0),
    ("memory_reserved", 0),
    ("max_memory_reserved", 0),
    ("device_memory_used", 0),
)


def enter_cpu_card() -> None:
    """Let Megatron-LM's trainer find a card, which is the CPU; :func:`enter_cpu` is called before."""
    # torch.compile would look for a compiler, and guards every name of torch.cuda.
    torch._dynamo.config.disable = True
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    for name, answer in CARD_ANSWERS:
        setattr(torch.cuda, name, _returning(answer))
