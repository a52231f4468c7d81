"""What differs between the supported versions of megatron-core, 0.16.1 and 0.19.2, and what serves both.

The versions are told apart by what they have, never by their number, and here alone: the rest of the package is written
once. A version between or after them was not tried.
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
    """One change of megatron-core's.

    Attributes:
        since: the release that made it.
        change: what it is.
        served_by: what makes it invisible.
        is_here: whether the installed version has it.
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
        "filesystem_async._get_write_results_queue lost its underscore",
        "results_queue_name",
        lambda: hasattr(filesystem_async, "get_write_results_queue"),
    ),
    "asynchronous saving": Difference(
        "0.17",
        "dist_checkpointing.save plans for nvidia-resiliency-ext unless told otherwise",
        "save_settings",
        lambda: _takes(serialization.save, "async_strategy"),
    ),
    "files per rank": Difference(
        "0.17",
        "TorchDistSaveShardedStrategy writes one file per rank, not two",
        "FILES_PER_RANK",
        lambda: inspect.signature(torch_strategy.TorchDistSaveShardedStrategy).parameters["thread_count"].default == 1,
    ),
    "loading": Difference(
        "0.17",
        "each rank plans its loading alone, without flattening the state, with a reader made from more arguments",
        "the reader of safe_checkpoint.py, reads_alone",
        lambda: _takes(torch_strategy.TorchDistLoadShardedStrategy.load, "async_strategy"),
    ),
    "Transformer Engine": Difference(
        "0.17",
        "the package names no range of Transformer Engine's versions, and is written for newer ones",
        "accepted_transformer_engine",
        lambda: not _limits_transformer_engine(),
    ),
    "CUDA graphs": Difference(
        "0.18",
        "TransformerConfig.cuda_graph_scope is called cuda_graph_modules",
        "without_cuda_graphs",
        lambda: _has_field(TransformerConfig, "cuda_graph_modules"),
    ),
    "plain values": Difference(
        "0.19",
        "what is not sharded is the entry common_state of the shards, not the file common.pt, and is unpickled "
        "without a list of allowed classes",
        "common_state_reader, common_state_writers, and common_state.py, which writes common.pt instead",
        lambda: not hasattr(common, "TorchCommonLoadStrategy"),
    ),
    "metadata.json": Difference(
        "0.19",
        "metadata.json does not name the format of common.pt",
        "nothing: 0.16.1 has that format as default",
        lambda: not _has_field(core.CheckpointingConfig, "common_backend"),
    ),
    "log": Difference(
        "0.19",
        "building a GPTModel logs that it is deprecated; other lines and warnings came with 0.17 and 0.18",
        "the filters of megatron_tst/__init__.py, device.py and safe_checkpoint.py",
        lambda: "IS DEPRECATED" in inspect.getsource(GPTModel.__init__),
    ),
}

# The range that 0.16.1 names; for 0.19.2, from what its base image holds up to the newest that the loss was tried with.
OLDER_TRANSFORMER_ENGINE = SpecifierSet(">=2.9,<2.12", prereleases=True)
NEWER_TRANSFORMER_ENGINE = SpecifierSet(">=2.16,<2.21", prereleases=True)

# What 0.16.1 does by default.
FILES_PER_RANK = 2


def accepted_transformer_engine() -> SpecifierSet:
    """Return the versions of Transformer Engine that belong to the installed megatron-core."""
    return NEWER_TRANSFORMER_ENGINE if DIFFERENCES["Transformer Engine"].is_here() else OLDER_TRANSFORMER_ENGINE


def check_transformer_engine(installed: str | None) -> None:
    """Check that Transformer Engine is one that the installed megatron-core is written for.

    Args:
        installed: its version, or None where it is not used.

    Raises:
        UserError: if it is not.
    """
    accepted = accepted_transformer_engine()
    if installed is not None and installed not in accepted:
        core_version = importlib.metadata.version("megatron-core")
        raise UserError(
            f"Transformer Engine {installed} does not belong to megatron-core {core_version}, which takes {accepted}: "
            "docs/docker.md has the pairs"
        )


def results_queue_name() -> str:
    """Return the name in ``filesystem_async`` of the function that makes the queue of writers' results."""
    return "get_write_results_queue" if DIFFERENCES["results queue"].is_here() else "_get_write_results_queue"


def save_settings() -> dict[str, Any]:
    """Return the arguments of ``dist_checkpointing.save`` that choose megatron-core's own writer."""
    return {"async_strategy": "mcore"} if DIFFERENCES["asynchronous saving"].is_here() else {}


def without_cuda_graphs() -> dict[str, Any]:
    """Return the arguments of ``TransformerConfig`` that leave every module out of CUDA graphs."""
    return {"cuda_graph_modules" if DIFFERENCES["CUDA graphs"].is_here() else "cuda_graph_scope": []}


def reads_alone() -> bool:
    """Whether each rank reads a checkpoint without asking the others whether they can."""
    return DIFFERENCES["loading"].is_here()


def common_state_reader() -> tuple[Any, str]:
    """Return where ``dist_checkpointing.load`` finds the function, of a folder, that reads what is not sharded."""
    if DIFFERENCES["plain values"].is_here():
        return serialization, "load_common_state_dict"
    return common.TorchCommonLoadStrategy, "load_common"


def common_state_writers() -> list[tuple[Any, str]]:
    """Return where ``dist_checkpointing.save`` finds its function, if it has one, that writes ``common.pt``."""
    return [] if DIFFERENCES["plain values"].is_here() else [(common.TorchCommonSaveStrategy, "save_common")]
