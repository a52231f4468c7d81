"""The information on its run that a checkpoint holds besides tensors: ``run_state.json`` and ``config.yaml``."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tst.config import RunConfig, UserError, load_config, write_json
from megatron_tst.megatron_patches.common_state import read_common_state
from megatron_tst.megatron_patches.safe_checkpoint import read_metadata
from megatron_tst.superposition import Phase, Schedule

RUN_STATE, CONFIG = "run_state.json", "config.yaml"


@dataclass(frozen=True)
class RunState:
    """The progress of a run, and the facts that a resumed run must match.

    Attributes:
        iteration: number of completed optimizer steps.
        schedule: the phases of the run.
        samples_per_phase: number of sequences that each phase has consumed.
        global_batch_size: sequences per step.
        vocab_size: tokens in the vocabulary, before padding.
        tokenizer: path of the tokenizer file.
        tokenizer_sha256: SHA-256 of the tokenizer file.
        sources: the document split of each corpus of the blend, with the fields of the data package's DocumentSplit.
        layout: sizes of the parallel layout that saved the checkpoint; the RNG state fits only this layout.
        is_permanent: whether retention never deletes this checkpoint.
        versions: versions of the packages with which the run computed.
        gpu_hours: GPU-hours of training, over all ranks and all starts.
    """

    iteration: int
    schedule: Schedule
    samples_per_phase: tuple[int, ...]
    global_batch_size: int
    vocab_size: int
    tokenizer: str
    tokenizer_sha256: str
    sources: list[dict[str, Any]]
    layout: dict[str, int]
    is_permanent: bool
    versions: dict[str, str | None]
    gpu_hours: float = 0.0


def write_run_state(folder: Path, state: RunState, config_yaml: str) -> None:
    """Write a checkpoint's ``run_state.json`` and ``config.yaml``."""
    (folder / RUN_STATE).write_text(dump_run_state(state) + "\n", encoding="utf-8")
    (folder / CONFIG).write_text(config_yaml, encoding="utf-8")


def dump_run_state(state: RunState) -> str:
    """Return the state as JSON."""
    mapping = dataclasses.asdict(state)
    mapping["phases"] = mapping.pop("schedule")["phases"]
    return write_json(mapping, indent=2)


def parse_run_state(text: str, source: str) -> RunState:
    """Return the state that :func:`dump_run_state` wrote.

    Raises:
        UserError: if it is malformed.
    """
    try:
        mapping = json.loads(text)
        phases = tuple(Phase(**phase) for phase in mapping.pop("phases"))
        samples = tuple(mapping.pop("samples_per_phase"))
        return RunState(schedule=Schedule(phases), samples_per_phase=samples, **mapping)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source}: cannot be read: {error}") from error


def read_run_state(folder: Path) -> RunState:
    """Read a checkpoint's ``run_state.json``.

    Raises:
        UserError: if the file is missing or malformed.
    """
    path = folder / RUN_STATE
    try:
        return parse_run_state(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def read_saved_config(folder: Path) -> RunConfig:
    """Read the settings that a checkpoint was made with.

    Raises:
        UserError: if the file is missing or does not hold settings.
    """
    return load_config(folder / CONFIG)


def read_saved_arguments(folder: Path) -> dict[str, Any] | None:
    """Read the arguments ``args`` that Megatron-LM stores besides the shards.

    Returns:
        The arguments by name, or None if there are none that can be read without executing anything.
    """
    try:
        return dict(vars(read_common_state(folder, read_metadata(folder))["args"]))
    except Exception:  # whatever is wrong with the file, loading the weights reports it
        return None
