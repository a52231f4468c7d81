"""Megatron-Core pre-training in which a run is a list of phases, each with a bag size."""

import warnings

__version__ = "0.1.0"

# megatron-core says at import, once per module, that Transformer Engine or Apex is absent; a run says it once, in
# its own "using:" line. The filter stands here because it must be set before the first megatron-core import.
warnings.filterwarnings(
    "ignore",
    message=r"(Transformer Engine and Apex are|Apex is) not installed\. Falling back to",
    module=r"megatron\.core\.",
)
