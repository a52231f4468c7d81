"""Megatron-Core pre-training in which a run is a list of phases, each with a bag size."""

import importlib.util
import logging
import sys
import warnings

import torch

__version__ = "0.2.0"

# All settings stand here because they must be made before the first megatron-core import.

# megatron-core says at import, once per module, that Transformer Engine or Apex is absent; a run says it once, in
# its own "using:" line.
warnings.filterwarnings(
    "ignore",
    message=r"(Transformer Engine and Apex are|Apex is) not installed\. Falling back to",
    module=r"megatron\.core\.",
)
warnings.filterwarnings("ignore", message="MimoModelConfig is experimental")
# It uses Python's own logging instead.
warnings.filterwarnings("ignore", message="absl.logging is not installed")

# What newer versions of megatron-core write to the log, or make torch write, that a user can do nothing about: the
# logger, and how the line begins.
_UNWANTED_LINES = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_UNWANTED_LINES[record.name])


for _name in _UNWANTED_LINES:
    logging.getLogger(_name).addFilter(_is_wanted)

# megatron-core takes Adam and other parts from these wherever it can import them, but they compute with CUDA alone.
if not torch.cuda.is_available():
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
# NVIDIA's apex is built with or without its CUDA extensions, and PyPI has another package of that name.
if not torch.cuda.is_available() or importlib.util.find_spec("amp_C") is None:
    sys.modules.setdefault("apex", None)  # type: ignore[arg-type]
