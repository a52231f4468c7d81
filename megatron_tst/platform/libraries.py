"""Which optional accelerator libraries this machine has."""

import importlib.metadata
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Libraries:
    """Versions of the libraries a run computes with; None where one is not installed.

    Attributes:
        transformer_engine: its version.
        apex: "present" if NVIDIA's apex (not PyPI's package of that name) is importable.
    """

    transformer_engine: str | None
    apex: str | None


def find_libraries() -> Libraries:
    """Look for Transformer Engine and NVIDIA's apex without importing them."""
    has_te = importlib.util.find_spec("transformer_engine") is not None
    te_version = importlib.metadata.version("transformer_engine") if has_te else None
    # PyPI's unrelated package is also called apex; only NVIDIA's has multi_tensor_apply.
    has_apex = (
        importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.multi_tensor_apply") is not None
    )
    return Libraries(transformer_engine=te_version, apex="present" if has_apex else None)
