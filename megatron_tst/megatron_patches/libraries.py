"""The parts of optional accelerator libraries that a run computes with."""

import importlib.metadata
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Libraries:
    """What Transformer Engine and NVIDIA's apex contribute to a run; nothing by default.

    Attributes:
        transformer_engine: version of Transformer Engine, or None if it is not used. It provides layers with their
            norms and attention, fused rotary embedding and expert permutation, fused cross-entropy, and Adam.
        apex: whether apex is used; it provides Adam if Transformer Engine is absent.
        gradient_accumulation_fusion: whether weight gradients are added to ``main_grad`` inside their matrix
            multiplication. The output layer is always megatron-core's own, which needs an extension of apex for this.
    """

    transformer_engine: str | None = None
    apex: bool = False
    gradient_accumulation_fusion: bool = False

    @property
    def adam(self) -> str:
        """The library whose Adam megatron-core uses, by the order in which it tries to import them."""
        if self.transformer_engine is not None:
            return "Transformer Engine"
        return "apex" if self.apex else "torch"

    def describe(self, cross_entropy: str) -> str:
        """Name the library that computes each part of a step, for the run's first log lines.

        Args:
            cross_entropy: the implementation of the loss, ``te``, ``native`` or ``linear``.
        """
        has_te = self.transformer_engine is not None
        parts = {
            "layers": f"Transformer Engine {self.transformer_engine}" if has_te else "megatron-core",
            "norms and attention": "Transformer Engine" if has_te else "torch",
            "cross-entropy": "Transformer Engine" if cross_entropy == "te" else cross_entropy,
            "Adam": self.adam,
            "gradient accumulation": "fused, apex" if self.gradient_accumulation_fusion else "not fused",
        }
        return "; ".join(f"{part}: {library}" for part, library in parts.items())


def find_libraries() -> Libraries:
    """Find the libraries without importing them; ``megatron_tst/__init__.py`` hides those that cannot be used."""
    has_te, has_apex, has_fusion = (
        importlib.util.find_spec(name) is not None
        for name in ("transformer_engine", "apex", "fused_weight_gradient_mlp_cuda")
    )
    return Libraries(
        transformer_engine=importlib.metadata.version("transformer_engine") if has_te else None,
        apex=has_apex,
        gradient_accumulation_fusion=has_apex and has_fusion,
    )
