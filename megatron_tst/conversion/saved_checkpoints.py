"""Everything that a conversion reads and writes of a checkpoint besides its tensors."""

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

# dist_checkpointing checks these fields before it reads a checkpoint.
_FORMATS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def check_files(folder: Path, on_progress: Callable[[int], object] = lambda _: None) -> None:
    """Compare a checkpoint's files with their checksums.

    Args:
        folder: folder of the checkpoint.
        on_progress: called with the number of bytes of each part that is read.

    Raises:
        UserError: if a file is damaged.
    """
    damage = find_damage_alone(folder, on_progress=on_progress)
    if damage is not None:
        raise UserError(f"{damage}; --no-verify-checkpoint converts it unchecked")


def find_saved_checkpoint(
    checkpoints: Path, iteration: int | None, *, check: Callable[[Path], None] | None = check_files
) -> SavedCheckpoint:
    """Find a checkpoint of a run, of imported weights or of Megatron-LM.

    Args:
        checkpoints: the folder of checkpoints.
        iteration: iteration of the checkpoint; None takes the one that the tracker names.
        check: function that compares the files with their checksums, if there are any; None skips this check.

    Raises:
        UserError: if there is none, a file is damaged, or its settings cannot be read.
    """
    folder = _find_folder(CheckpointFolders(checkpoints), iteration)
    if check is not None and is_written_here(folder):
        check(folder)
    saved = open_checkpoint(folder)
    _ = saved.model  # raises here, before any tensor is read, if the settings cannot be used
    if not saved.has_checksums:
        # The whole padded vocabulary belongs to the model, because the padding took part in the training softmax.
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
            f"--load {folders.path}: {TRACKER} {named}, and the folder holds checkpoints of the steps {steps}: choose "
            "one with --iteration"
        )
    return folders.of(wanted)


def complete_weights(checkpoints: Path, config: RunConfig) -> None:
    """Write the files that a checkpoint needs besides its tensors.

    The checkpoint holds no run state, so a run can start from it (``--finetune``) but cannot resume it.

    Args:
        checkpoints: the folder of checkpoints, with the tensors in the folder of step 0.
        config: settings of the model, including its vocabulary and tokenizer.
    """
    folders = CheckpointFolders(checkpoints)
    folder = folders.of(0)
    torch.save({"checkpoint_version": FORMAT_VERSION, "iteration": 0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_FORMATS), encoding="utf-8")
    (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
    write_checksums(folder, known={})
    folders.point_to(0)
