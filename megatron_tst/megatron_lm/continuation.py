"""Where a run starts: from scratch, or from a checkpoint of either trainer that it goes on from.

What a run knows beside tensors rides in Megatron-LM's ``args``, which every checkpoint holds.
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
    """Where a run starts.

    Attributes:
        schedule: the phases to run.
        step: optimizer steps done already.
        gpu_hours: that these took.
        splits: how the documents are split among the phases, where that is to be continued.
        state: of the checkpoint to go on from, or None.
    """

    schedule: Schedule
    step: int = 0
    gpu_hours: float = 0.0
    splits: list[DocumentSplit] | None = None
    state: RunState | None = None


def find_start(args: Namespace, config: RunConfig) -> Start:
    """Find the checkpoint to start from, and check that this run may go on from it.

    Raises:
        UserError: if the checkpoint is not of a run, or was made with settings that this run may not change.
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
        raise UserError(f"--train-iters {args.train_iters}: {folders.of(step)} has {state.iteration} steps done")
    return start


def _read(folder: Path) -> tuple[RunState, RunConfig]:
    if not folder.is_dir():
        raise UserError(f"--load {folder.parent}: {folder.name} is not there")
    if (folder / RUN_STATE).exists():  # the own trainer's
        return read_run_state(folder), read_saved_config(folder)
    arguments = read_saved_arguments(folder) or {}
    if _STATE not in arguments:
        raise UserError(
            f"--load {folder}: was not saved by a run with --tst-trainer: only its weights can be used, add --finetune"
        )
    return parse_run_state(arguments[_STATE], str(folder)), load_config_text(arguments[_CONFIG], str(folder))


def check_identity(start: Start, *, tokenizer_sha256: str, global_batch_size: int, vocab_size: int) -> None:
    """Check that the text of a run that goes on is dealt as before.

    Raises:
        UserError: naming the first thing that differs.
    """
    state = start.state
    if state is None or start.splits is None:
        return
    instead = "to go on nevertheless, add --override-run-config"
    if state.vocab_size != vocab_size:
        raise UserError(f"--vocab-size {vocab_size}: the checkpoint's vocabulary has {state.vocab_size} tokens")
    if state.global_batch_size != global_batch_size:
        raise UserError(
            f"--global-batch-size {global_batch_size}: the checkpoint has {state.global_batch_size}; {instead}"
        )
    if state.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(f"--tokenizer-model: is not the checkpoint's ({state.tokenizer}); {instead}")


def remember(args: Namespace, state: RunState, config: RunConfig) -> None:
    """Put what a run knows into the arguments, which the next checkpoint holds."""
    setattr(args, _STATE, dump_run_state(state))
    setattr(args, _CONFIG, dump_config(config))
