"""The device of this process: its CUDA card, or the CPU where no card exists."""

import functools
import os
import resource
import subprocess
import warnings
from dataclasses import dataclass

import torch

# What megatron-core does that torch or itself warns of; a user can do nothing about it.
_KNOWN_WARNINGS = (
    r"`torch\.distributed\.\w+_tensor` is deprecated",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    # Attention registers its last projection before its first, so a bucket may begin between them: its weights are
    # asked for early, once, and nothing is computed otherwise.
    r"The next bucket's parameter all-gather operation has already been dispatched",
)


@dataclass(frozen=True)
class Device:
    """What a rank computes on.

    Attributes:
        torch_device: where tensors live.
        backend: the ``torch.distributed`` backend that connects such devices.
        name: in words, for the run's first lines.
    """

    torch_device: torch.device
    backend: str
    name: str


@functools.cache
def enter_device() -> Device:
    """Choose this process's device and make megatron-core use it; further calls return the same device.

    With CUDA, the card is the one numbered by torchrun's ``LOCAL_RANK``. Without, megatron-core is made to run on
    the CPU (:mod:`megatron_tst.megatron_patches.cpu`) and ranks talk through gloo.
    """
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(index)
        return Device(torch.device("cuda", index), "nccl", torch.cuda.get_device_name(index))
    # Imported only here: it reads megatron-core's modules, which a CUDA run must find untouched.
    from megatron_tst.megatron_patches.cpu import CPU, enter_cpu

    enter_cpu()
    # megatron-core warns where this CUDA setting is absent; there is no CUDA here to set.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return Device(CPU, "gloo", f"CPU, {torch.get_num_threads()} threads")


def visible_gpus() -> list[str]:
    """Return the cards that a process may be given, each as CUDA_VISIBLE_DEVICES names it."""
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[:count] if names else [str(number) for number in range(count)]


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or ``unknown``."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def peak_memory_bytes() -> int:
    """Return the most memory this process has held: allocated on its card, or resident where there is none."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
