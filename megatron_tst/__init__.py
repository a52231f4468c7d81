"""Megatron-Core pre-training in which a run is a list of phases, each with a bag size."""

import importlib.util
import sys
import warnings

import torch

__version__ = "0.1.0"

# Both settings stand here because they must be made before the first megatron-core import.

# megatron-core says at import, once per module, that Transformer Engine or Apex is absent; a run says it once, in
# its own "using:" line.
warnings.filterwarnings(
    "ignore",
    message=r"(Transformer Engine and Apex are|Apex is) not installed\. Falling back to",
    module=r"megatron\.core\.",
)

# megatron-core takes Adam and other parts from these wherever it can import them, but they compute with CUDA alone.
if not torch.cuda.is_available():
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
# NVIDIA's apex is built with or without its CUDA extensions, and PyPI has another package of that name.
if not torch.cuda.is_available() or importlib.util.find_spec("amp_C") is None:
    sys.modules.setdefault("apex", None)  # type: ignore[arg-type]
