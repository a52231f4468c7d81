"""The CPU as a platform for megatron-core, which writes ``"cuda"`` and ``torch.cuda`` where it means "the device".

Everything that makes megatron-core 0.16.1 run without a GPU stands in this file, each entry with its reason, and
is entered once, at start, by :func:`megatron_tst.distributed.enter_device`.
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
    """Read every "cuda" that is handed to a torch function as "cpu"."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` with its device on the CPU."""
        kwargs = kwargs or {}
        # Literals such as torch.zeros([], device="cuda") in the pipeline schedules.
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        # Host memory is pinned for copies to a card, such as the rotary embedding's choice of context-parallel chunks.
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if func is torch.Tensor.cuda:
            return args[0]
        # The mixed-precision and distributed optimizers tell dtypes by the name of the CUDA tensor type.
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
    """A CUDA stream or event that has nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Accept whatever a stream or event is made with."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Answer wait_stream, record_event, synchronize, ... by doing nothing; an event is as idle as its stream."""
        return _returning(self)


def _returning(value: Any) -> Callable[..., Any]:
    """Make a function of its own: torch.compile's tables want no function under two names of ``torch.cuda``."""

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
    """Turn split sizes into numpy also where they are on the CPU already (the original asks ``is_cuda`` first)."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


# (module, name, stand-in): what megatron-core calls on the way of a training step.
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
    # The random tracker of dropout and initialisation keeps "the CUDA generator": here the CPU's.
    (megatron_random, "_get_cuda_rng_state", _get_rng_state),
    (megatron_random, "_set_cuda_rng_state", _set_rng_state),
    # The alltoall dispatcher hands split sizes to torch.distributed, which wants host numbers.
    (token_dispatcher, "maybe_move_tensor_to_cpu", _split_sizes_to_numpy),
    # The router reads this name whether or not Transformer Engine, which defines it, could be imported.
    (moe_utils, "te_general_gemm", None),
)


def _is_not_about_shared_generator(record: logging.LogRecord) -> bool:
    # Forking "the CUDA generator" does move the CPU's here: they are one, and the fork puts it back.
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
