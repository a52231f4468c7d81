"""Compile Transformer Engine's cross-entropy for an absent GPU, with the arguments that the loss passes.

``python -m tests.model.te_compiled FOLDER`` calls the fused cross-entropy of the unpacked wheel in FOLDER with
logits of each dtype, on a single rank and on one of two tensor-parallel ranks. Each kernel launch ends after Triton has
compiled the kernel for a compute capability. The compiled kernels are described as JSON on standard output.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from megatron_tst.model.te_loss import adapt_kernel
from tests.model.kernels import load_wheel

L, B, VOCAB = 2, 1, 128256
CAPABILITIES = (90, 100)  # H100 and H200; B200


class AbsentCard:
    """The part of a driver that Triton's compiler uses."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # Triton caches kernels by the number of the device.

    def get_current_stream(self, device: int) -> int:
        return 0


def describe(kernel: Any) -> dict[str, Any]:
    """Describe a compiled kernel: its target, and whether its binary is an ELF file, as ptxas writes it."""
    (target,) = (line.split()[1].rstrip(",") for line in kernel.asm["ptx"].splitlines() if line.startswith(".target"))
    return {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "target": target,
        "is_elf": kernel.asm["cubin"].startswith(b"\x7fELF"),
    }


def main(folder: str) -> None:
    """Print the kernels compiled for each capability, dtype of the logits and number of tensor-parallel ranks."""
    made: list[Any] = []
    run = JITFunction.run
    JITFunction.run = lambda *args, **named: made.append(run(*args, **{**named, "warmup": True}))
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    kernel = adapt_kernel(load_wheel(Path(folder)))
    cases = itertools.product(CAPABILITIES, (torch.bfloat16, torch.float32), (dist.new_group([1]), dist.group.WORLD))
    compiled = []
    for capability, dtype, group in cases:
        triton.runtime.driver.set_active(AbsentCard(capability))
        logits = torch.zeros(L, B, VOCAB // group.size(), dtype=dtype, requires_grad=True)
        kernel(logits * 1.0, torch.zeros(L, B, dtype=torch.int64), -100, group).sum().backward()
        case = {"capability": capability, "logits": str(dtype), "ranks": group.size()}
        compiled += [case | describe(each) for each in made]
        made.clear()
    print(json.dumps(compiled))


if __name__ == "__main__":
    main(*sys.argv[1:])
