"""What a conversion needs to know of a checkpoint beside its tensors."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_tst.checkpoint.checksums import find_damage_alone, is_written_here, write_checksums
from megatron_tst.checkpoint.content import FORMAT_VERSION
from megatron_tst.checkpoint.find import refuse_other_folder
from megatron_tst.checkpoint.folders import TRACKER, CheckpointFolders
from megatron_tst.checkpoint.run_state import CONFIG, RUN_STATE
from megatron_tst.checkpoint.saved_checkpoint import SavedCheckpoint, open_checkpoint
from megatron_tst.config import RunConfig, UserError, dump_config

# What dist_checkpointing asks before it reads.
_FORMATS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def check_files(folder: Path, on_progress: Callable[[int], object] = lambda _: None) -> None:
    """Compare a checkpoint's files with their checksums.

    Args:
        folder: of the checkpoint.
        on_progress: called with the bytes of each part that is read.

    Raises:
        UserError: if one of them is damaged.
    """
    damage = find_damage_alone(folder, on_progress=on_progress)
    if damage is not None:
        raise UserError(f"{damage}; --no-verify-checkpoint converts it unchecked")


def find_saved_checkpoint(
    checkpoints: Path, iteration: int | None, *, check: Callable[[Path], None] | None = check_files
) -> SavedCheckpoint:
    """Find a checkpoint: of a run, of imported weights, or of Megatron-LM's own.

    Args:
        checkpoints: the folder of checkpoints.
        iteration: which; the one that the tracker names where not given.
        check: compares its files with their checksums, if it has any; None to take them as they are.

    Raises:
        UserError: if there is none, a file is damaged, or its settings cannot be read.
    """
    folder = _find_folder(CheckpointFolders(checkpoints), iteration)
    if check is not None and is_written_here(folder):
        check(folder)
    saved = open_checkpoint(folder)
    _ = saved.model  # refused here, before anything is read
    if not saved.has_checksums:
        # All of its padded vocabulary is the model's: the padding took part in the softmax that it was trained with.
        return dataclasses.replace(saved, vocab_size=saved.num_embedding_rows)
    if saved.vocab_size is None or saved.tokenizer is None:
        raise UserError(f"{folder / RUN_STATE} is missing")
    return saved


def _find_folder(folders: CheckpointFolders, iteration: int | None) -> Path:
    steps, latest = folders.steps(), folders.latest()
    if not steps:
        refuse_other_folder(folders.path, "--iteration")
        raise UserError(f"--load {folders.path}: holds no checkpoints")
    if iteration is not None and iteration not in steps:
        raise UserError(f"--iteration {iteration}: {folders.path} holds {steps}")
    wanted = latest if iteration is None else iteration
    if wanted not in steps:
        named = "is missing or names no step" if latest is None else f"names step {latest}"
        raise UserError(
            f"--load {folders.path}: {TRACKER} {named}, and the checkpoints there are of the steps {steps}: choose one "
            "with --iteration"
        )
    return folders.of(wanted)


def complete_weights(checkpoints: Path, config: RunConfig) -> None:
    """Make a checkpoint of weights alone out of its tensors: write what stands beside them.

    Without a run's state it is a checkpoint to start from (``--finetune``), not one to resume.

    Args:
        checkpoints: the folder of checkpoints, with the tensors in that of step 0.
        config: settings of the model, its vocabulary and tokenizer included.
    """
    folders = CheckpointFolders(checkpoints)
    folder = folders.of(0)
    torch.save({"checkpoint_version": FORMAT_VERSION, "iteration": 0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_FORMATS), encoding="utf-8")
    (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
    write_checksums(folder, known={})
    folders.point_to(0)
