"""Finds where a run starts: from scratch, or from a checkpoint of either trainer.

The state of a run besides its tensors is stored in Megatron-LM's ``args``, which every checkpoint contains.
"""

import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron_tst.checkpoint.changes import check_changes, check_phases, find_changes, prolonged
from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.checkpoint.run_state import (
    RUN_STATE,
    RunState,
    dump_run_state,
    parse_run_state,
    read_run_state,
    read_saved_arguments,
    read_saved_config,
)
from megatron_tst.config import RunConfig, UserError, dump_config, load_config_text
from megatron_tst.data.document_split import DocumentSplit
from megatron_tst.superposition import Schedule

logger = logging.getLogger(__name__)
_STATE, _CONFIG = "tst_run_state", "tst_run_config"


@dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
        schedule: schedule of the phases to run.
        step: number of optimizer steps already done.
        gpu_hours: GPU-hours that these steps took.
        splits: split of the documents among the phases, to be continued; None if the documents are split anew.
        state: run state of the checkpoint to continue from; None without one.
    """

    schedule: Schedule
    step: int = 0
    gpu_hours: float = 0.0
    splits: list[DocumentSplit] | None = None
    state: RunState | None = None


def find_start(args: Namespace, config: RunConfig) -> Start:
    """Find the checkpoint to start from, and check that this run may continue from it.

    Raises:
        UserError: if the checkpoint is not a run's, or was made with settings that this run may not change.
    """
    fresh = Start(config.schedule)
    if args.load is None or args.finetune:
        return fresh
    folders = CheckpointFolders(Path(args.load))
    step = args.ckpt_step or folders.latest()
    if step is None:
        return fresh
    state, saved = _read(folders.of(step))
    check_changes(find_changes(saved, config), config.checkpoint, is_main=True)
    if config.checkpoint.override_run_config:
        start = Start(config.schedule, state.iteration, state.gpu_hours, state=state)
    else:
        check_phases(saved.phases, config.phases)
        splits = [DocumentSplit.from_saved(source) for source in state.sources]
        start = Start(prolonged(state.schedule, args.train_iters), state.iteration, state.gpu_hours, splits, state)
    if start.schedule.num_steps < state.iteration:
        raise UserError(f"--train-iters {args.train_iters}: {folders.of(step)} already has {state.iteration} steps")
    return start


def _read(folder: Path) -> tuple[RunState, RunConfig]:
    if not folder.is_dir():
        raise UserError(f"--load {folder.parent}: {folder.name} does not exist")
    if (folder / RUN_STATE).exists():  # the own trainer writes this file
        return read_run_state(folder), read_saved_config(folder)
    arguments = read_saved_arguments(folder) or {}
    if _STATE not in arguments:
        raise UserError(
            f"--load {folder}: was not saved by a run with --tst-trainer; only its weights can be used, with --finetune"
        )
    return parse_run_state(arguments[_STATE], str(folder)), load_config_text(arguments[_CONFIG], str(folder))


def remember(args: Namespace, state: RunState, config: RunConfig) -> None:
    """Store a run's state and settings in the arguments, which the next checkpoint contains."""
    setattr(args, _STATE, dump_run_state(state))
    setattr(args, _CONFIG, dump_config(config))
