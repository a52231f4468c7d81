"""Which parts of the optional accelerator libraries a run computes with."""

import importlib.metadata
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Libraries:
    """What Transformer Engine and NVIDIA's apex contribute to a run; nothing by default.

    Attributes:
        transformer_engine: its version, or None where it is not used. Layers with their norms and attention, fused
            rotary embedding and expert permutation, the fused cross-entropy and Adam come from it.
        apex: whether it is used: Adam comes from it where Transformer Engine is absent.
        gradient_accumulation_fusion: whether weight gradients are added to ``main_grad`` inside their matrix
            multiplication. The output layer is megatron-core's own, whatever the others are, and needs an extension
            of apex for it.
    """

    transformer_engine: str | None = None
    apex: bool = False
    gradient_accumulation_fusion: bool = False

    @property
    def adam(self) -> str:
        """Whose Adam megatron-core takes: it imports them in this order."""
        if self.transformer_engine is not None:
            return "Transformer Engine"
        return "apex" if self.apex else "torch"

    def describe(self, cross_entropy: str) -> str:
        """Name what computes each part of a step, for the run's first lines.

        Args:
            cross_entropy: the chosen implementation, ``te``, ``native`` or ``linear``.
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
    """Look for the libraries without importing them; ``megatron_tst/__init__.py`` hides those that cannot be used."""
    has_te, has_apex, has_fusion = (
        importlib.util.find_spec(name) is not None
        for name in ("transformer_engine", "apex", "fused_weight_gradient_mlp_cuda")
    )
    return Libraries(
        transformer_engine=importlib.metadata.version("transformer_engine") if has_te else None,
        apex=has_apex,
        gradient_accumulation_fusion=has_apex and has_fusion,
    )
