"""``--deterministic-mode``: a run gives the same bits each time it is started, also on a GPU.

This module imports neither megatron-core nor Transformer Engine, because the settings must be made before their import.
"""

import os

import torch

from megatron_tst.config import UserError

# The values that each environment variable may have, its default first. megatron.training accepts the same values.
_ACCEPTED = {
    # Transformer Engine's attention avoids backward passes whose order of summation varies.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    # cuBLAS uses workspaces of a fixed size.
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # NCCL sums in an order that depends only on the topology.
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
}


def compute_deterministically() -> None:
    """Make torch, cuBLAS, NCCL and Transformer Engine compute in a fixed order for the rest of this process.

    Every rank calls it, before megatron-core is imported and anything is computed.

    Raises:
        UserError: if an environment variable has a value that rules a fixed order out.
    """
    for name, accepted in _ACCEPTED.items():
        value = os.environ.setdefault(name, accepted[0])
        if not set(value.split(",")) <= set(accepted):
            raise UserError(f"--deterministic-mode: {name}={value}: must be {' or '.join(accepted)}, or not be set")
    # CUDA operations that use atomic additions, such as index_add_, then sort instead or raise an error.
    torch.use_deterministic_algorithms(True)
