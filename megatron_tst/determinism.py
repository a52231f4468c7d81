"""``--deterministic-mode``: a run gives the same bits each time it is started, on a card too.

This module imports neither megatron-core nor Transformer Engine, because both must find the settings made.
"""

import os

import torch

from megatron_tst.config import UserError

# Environment variable: what it may say; the first where nobody set it. megatron.training accepts the same values.
_ACCEPTED = {
    # Transformer Engine's attention leaves out the backward passes that add up in any order.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    # cuBLAS gives each stream the same workspace.
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # NCCL adds up in an order that the topology alone decides.
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
}


def compute_deterministically() -> None:
    """Make torch, cuBLAS, NCCL and Transformer Engine compute in a fixed order for the rest of this process.

    Every rank calls it, before megatron-core is imported and anything is computed.

    Raises:
        UserError: if the environment asks for the contrary.
    """
    for name, accepted in _ACCEPTED.items():
        value = os.environ.setdefault(name, accepted[0])
        if not set(value.split(",")) <= set(accepted):
            raise UserError(f"--deterministic-mode: {name}={value}: must be {' or '.join(accepted)}, or not be set")
    # Operations that add with atomics on a card, such as index_add_, sort instead; those that cannot raise an error.
    torch.use_deterministic_algorithms(True)
