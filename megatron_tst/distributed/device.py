"""The device of this process: its CUDA GPU, or the CPU if there is no GPU."""

import functools
import os
import resource
import subprocess
import warnings
from dataclasses import dataclass

import torch

# Warnings that megatron-core causes or prints itself, and that a user can do nothing about.
_KNOWN_WARNINGS = (
    r"`torch\.distributed\.\w+_tensor` is deprecated",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    # Attention registers its last projection before its first, so a bucket may begin between them. The bucket is then
    # gathered early, once; the results do not change.
    r"The next bucket's parameter all-gather operation has already been dispatched",
)


@dataclass(frozen=True)
class Device:
    """The device on which a rank computes.

    Attributes:
        torch_device: device of the rank's tensors.
        backend: the ``torch.distributed`` backend for such devices.
        name: description of the device for the run's first log lines.
    """

    torch_device: torch.device
    backend: str
    name: str


@functools.cache
def enter_device() -> Device:
    """Choose this process's device and make megatron-core use it; further calls return the same device.

    With CUDA, torchrun's ``LOCAL_RANK`` is the index of the GPU. Without CUDA, megatron-core is made to run on the CPU
    (:mod:`megatron_tst.megatron_patches.cpu`) and ranks communicate through gloo.
    """
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(index)
        return Device(torch.device("cuda", index), "nccl", torch.cuda.get_device_name(index))
    # Imported only here because the module changes megatron-core, which a CUDA run must use unchanged.
    from megatron_tst.megatron_patches.cpu import CPU, enter_cpu

    enter_cpu()
    # megatron-core warns if this variable is not set, although it has no effect without CUDA.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return Device(CPU, "gloo", f"CPU, {torch.get_num_threads()} threads")


def visible_gpus() -> list[str]:
    """Return the GPUs that processes can use, under the names that CUDA_VISIBLE_DEVICES gives them."""
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
    """Return the peak memory of this process: allocated on its GPU, or resident if there is no GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
