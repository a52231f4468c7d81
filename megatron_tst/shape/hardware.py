"""GPUs and the links between them, from NVIDIA's data sheets."""

from dataclasses import dataclass

from megatron_tst.config import UserError
from megatron_tst.shape.flops import PEAK_TFLOPS


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, in nodes of eight.

    Attributes:
        name: name on the command line.
        peak_tflops: dense bfloat16 peak in 1e12 FLOPs per second.
        memory_gib: memory in GiB, as the driver reports it.
        nvlink_gb_per_s: bandwidth to the other GPUs of the node in one direction, 1e9 bytes per second.
        network_gb_per_s: bandwidth per GPU to other nodes in one direction, 1e9 bytes per second.
        per_node: GPUs per node.
    """

    name: str
    peak_tflops: float
    memory_gib: float
    nvlink_gb_per_s: float
    network_gb_per_s: float
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", PEAK_TFLOPS["B200"], 179.0, 900.0, 50.0),
        Gpu("h200", PEAK_TFLOPS["H200"], 140.4, 450.0, 50.0),
        Gpu("h100", PEAK_TFLOPS["H100"], 79.6, 450.0, 50.0),
        Gpu("a100", PEAK_TFLOPS["A100"], 80.0, 300.0, 25.0),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name; case does not matter.

    Raises:
        UserError: if the name is unknown.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: unknown; choose from {', '.join(GPUS)}")
    return GPUS[name.lower()]
