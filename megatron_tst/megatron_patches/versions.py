"""Differences between the supported versions of megatron-core, 0.16.1 and 0.19.2, and code that works with both.

Only this module distinguishes versions, and it does so by their features, never by their number. Other versions are
untested.
"""

import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from megatron.core.dist_checkpointing import core, serialization
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from packaging.specifiers import SpecifierSet

from megatron_tst.config import UserError


@dataclass(frozen=True)
class Difference:
    """One change in megatron-core.

    Attributes:
        since: the release with the change.
        change: the change in words.
        served_by: the code that hides the change from the rest of the package.
        is_here: function that tells whether the installed version has the change.
    """

    since: str
    change: str
    served_by: str
    is_here: Callable[[], bool]


def _takes(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def _limits_transformer_engine() -> bool:
    required = importlib.metadata.requires("megatron-core") or []
    return any(line.startswith("transformer-engine") and "<" in line for line in required)


def _has_field(dataclass_type: Any, name: str) -> bool:
    return name in {field.name for field in fields(dataclass_type)}


DIFFERENCES: dict[str, Difference] = {
    "results queue": Difference(
        "0.17",
        "filesystem_async._get_write_results_queue is renamed to get_write_results_queue",
        "results_queue_name",
        lambda: hasattr(filesystem_async, "get_write_results_queue"),
    ),
    "asynchronous saving": Difference(
        "0.17",
        "dist_checkpointing.save uses nvidia-resiliency-ext by default",
        "save_settings",
        lambda: _takes(serialization.save, "async_strategy"),
    ),
    "files per rank": Difference(
        "0.17",
        "TorchDistSaveShardedStrategy writes one file per rank instead of two",
        "FILES_PER_RANK",
        lambda: inspect.signature(torch_strategy.TorchDistSaveShardedStrategy).parameters["thread_count"].default == 1,
    ),
    "loading": Difference(
        "0.17",
        "each rank plans its loading alone and does not flatten the state, and the reader takes more arguments",
        "the reader of safe_checkpoint.py, reads_alone",
        lambda: _takes(torch_strategy.TorchDistLoadShardedStrategy.load, "async_strategy"),
    ),
    "Transformer Engine": Difference(
        "0.17",
        "the package names no version range of Transformer Engine and is written for newer versions",
        "accepted_transformer_engine",
        lambda: not _limits_transformer_engine(),
    ),
    "CUDA graphs": Difference(
        "0.18",
        "TransformerConfig.cuda_graph_scope is renamed to cuda_graph_modules",
        "without_cuda_graphs",
        lambda: _has_field(TransformerConfig, "cuda_graph_modules"),
    ),
    "plain values": Difference(
        "0.19",
        "the common state is the entry common_state of the shards instead of the file common.pt, and is unpickled "
        "without a list of allowed classes",
        "common_state_reader, common_state_writers, and common_state.py, which writes common.pt instead",
        lambda: not hasattr(common, "TorchCommonLoadStrategy"),
    ),
    "metadata.json": Difference(
        "0.19",
        "metadata.json does not name the format of common.pt",
        "nothing: 0.16.1 uses that format by default",
        lambda: not _has_field(core.CheckpointingConfig, "common_backend"),
    ),
    "log": Difference(
        "0.19",
        "building a GPTModel logs that it is deprecated; 0.17 and 0.18 added other lines and warnings",
        "the filters of megatron_tst/__init__.py, device.py and safe_checkpoint.py",
        lambda: "IS DEPRECATED" in inspect.getsource(GPTModel.__init__),
    ),
}

# For 0.16.1 the range that it names; for 0.19.2 from the version in its base image to the newest tested with the loss.
OLDER_TRANSFORMER_ENGINE = SpecifierSet(">=2.9,<2.12", prereleases=True)
NEWER_TRANSFORMER_ENGINE = SpecifierSet(">=2.16,<2.21", prereleases=True)

# The default of 0.16.1.
FILES_PER_RANK = 2


def accepted_transformer_engine() -> SpecifierSet:
    """Return the versions of Transformer Engine that the installed megatron-core supports."""
    return NEWER_TRANSFORMER_ENGINE if DIFFERENCES["Transformer Engine"].is_here() else OLDER_TRANSFORMER_ENGINE


def check_transformer_engine(installed: str | None) -> None:
    """Check that the installed megatron-core supports the installed Transformer Engine.

    Args:
        installed: version of Transformer Engine, or None if it is not used.

    Raises:
        UserError: if the version is not supported.
    """
    accepted = accepted_transformer_engine()
    if installed is not None and installed not in accepted:
        core_version = importlib.metadata.version("megatron-core")
        raise UserError(
            f"Transformer Engine {installed} does not match megatron-core {core_version}, which supports {accepted}; "
            "see docs/docker.md for matching versions"
        )


def results_queue_name() -> str:
    """Return the name of the function in ``filesystem_async`` that creates the queue of the writers' results."""
    return "get_write_results_queue" if DIFFERENCES["results queue"].is_here() else "_get_write_results_queue"


def save_settings() -> dict[str, Any]:
    """Return the arguments of ``dist_checkpointing.save`` that select megatron-core's own writer."""
    return {"async_strategy": "mcore"} if DIFFERENCES["asynchronous saving"].is_here() else {}


def without_cuda_graphs() -> dict[str, Any]:
    """Return the arguments of ``TransformerConfig`` that exclude every module from CUDA graphs."""
    return {"cuda_graph_modules" if DIFFERENCES["CUDA graphs"].is_here() else "cuda_graph_scope": []}


def reads_alone() -> bool:
    """Return whether each rank reads a checkpoint without checking that the others can read it too."""
    return DIFFERENCES["loading"].is_here()


def common_state_reader() -> tuple[Any, str]:
    """Return owner and name of the function with which ``dist_checkpointing.load`` reads a directory's common state."""
    if DIFFERENCES["plain values"].is_here():
        return serialization, "load_common_state_dict"
    return common.TorchCommonLoadStrategy, "load_common"


def common_state_writers() -> list[tuple[Any, str]]:
    """Return owner and name of the function, if any, with which ``dist_checkpointing.save`` writes ``common.pt``."""
    return [] if DIFFERENCES["plain values"].is_here() else [(common.TorchCommonSaveStrategy, "save_common")]
