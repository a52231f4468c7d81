"""Find the checkpoint to load: choose the step, verify the checkpoint, and read its information about its run."""

import logging
from pathlib import Path

from megatron_tst.checkpoint.checksums import find_damage, is_written_here
from megatron_tst.checkpoint.folders import TRACKER, CheckpointFolders
from megatron_tst.checkpoint.run_state import RUN_STATE
from megatron_tst.checkpoint.saved_checkpoint import SavedCheckpoint, open_checkpoint
from megatron_tst.config import CheckpointSettings, UserError
from megatron_tst.distributed import ParallelState, run_on_main_rank
from megatron_tst.megatron_patches.safe_checkpoint import METADATA

logger = logging.getLogger(__name__)


def find_checkpoint(settings: CheckpointSettings, ranks: ParallelState) -> SavedCheckpoint | None:
    """Find the checkpoint that ``--load`` asks for; if it is damaged, fall back to the previous one.

    Collective: every rank of the world calls it.

    Returns:
        The newest intact checkpoint that is not newer than the one that the tracker names; None if there are none.

    Raises:
        UserError: if there are checkpoints, but none is intact or none is the one that the tracker or ``--ckpt-step``
            names; or if there are none and a setting needs one.
    """
    if settings.load is None:
        return None
    folders = CheckpointFolders(Path(settings.load))
    # Only one rank looks, because a network file system may temporarily show ranks different content.
    candidates = run_on_main_rank(lambda: _candidates(folders, settings.ckpt_step))
    for folder, is_checkable in candidates:
        damage = find_damage(folder, ranks) if is_checkable and not settings.no_verify_checkpoint else None
        if ranks.is_main and not is_checkable:
            logger.info("%s: has no checksums because megatron-tst did not write it; it is loaded unchecked", folder)
        if damage is None:
            return run_on_main_rank(lambda folder=folder: _open(folder, settings.finetune))  # type: ignore[misc]
        if ranks.is_main:
            logger.warning("WARNING: %s; it is not changed, and the previous checkpoint is tried", damage)
    if candidates:
        raise UserError(f"--load {settings.load}: none of its {len(candidates)} checkpoints is intact")
    if settings.finetune:
        raise UserError(f"--load {settings.load}: holds no checkpoint, and --finetune needs one")
    if settings.exit_on_missing_checkpoint:
        raise UserError(f"--load {settings.load}: holds no checkpoint (--exit-on-missing-checkpoint)")
    if ranks.is_main:
        logger.info("--load %s: holds no checkpoint yet; the run starts from scratch", settings.load)
    return None


def _candidates(folders: CheckpointFolders, wanted: int | None) -> list[tuple[Path, bool]]:
    """Return the checkpoints to try, best first, and whether each can be compared with checksums."""
    steps, latest = folders.steps(), folders.latest()
    if wanted is not None:
        if wanted not in steps:
            raise UserError(f"--ckpt-step {wanted}: {folders.path} holds {steps or 'no checkpoints'}")
        return [_candidate(folders.of(wanted))]
    if not steps:
        refuse_other_folder(folders.path, "--ckpt-step")
    chosen = [step for step in reversed(steps) if latest is None or step <= latest]
    named = "no step" if latest is None else f"step {latest}"
    if not chosen and folders.tracker.exists():
        instead = f"the existing checkpoints are of steps {steps}; choose one with --ckpt-step"
        nothing = f"there is no checkpoint; delete {TRACKER} to start from scratch"
        raise UserError(f"--load {folders.path}: {TRACKER} names {named}, but {instead if steps else nothing}")
    if chosen and latest is None:
        logger.warning("WARNING: %s is missing or names no step; the newest checkpoint is loaded", folders.tracker)
    elif chosen and chosen[0] != latest:
        logger.warning(
            "WARNING: %s names %s, which does not exist; step %d is loaded", folders.tracker, named, chosen[0]
        )
    return [_candidate(folders.of(step)) for step in chosen]


def _candidate(folder: Path) -> tuple[Path, bool]:
    """Return a checkpoint and whether it must have checksums, which is the case unless another program wrote it."""
    return folder, is_written_here(folder) or not (folder / METADATA).exists()


def refuse_other_folder(path: Path, step_flag: str) -> None:
    """Refuse a path without checkpoints that is recognised as something else.

    Args:
        path: the path.
        step_flag: the flag that names the step of a checkpoint, for messages.

    Raises:
        UserError: if the path is recognised; the message names what it is.
    """
    inner = CheckpointFolders(path / "checkpoints")
    for is_so, reason in (
        (path.exists() and not path.is_dir(), "is not a directory"),
        ((path / METADATA).exists(), f"is a single checkpoint: name its parent, and the step with {step_flag}"),
        (bool(inner.steps()), f"is a run directory: name {inner.path}"),
        ((path / "config.json").exists(), "is a Hugging Face directory: convert it with tools/convert_ckpt.py first"),
    ):
        if is_so:
            raise UserError(f"--load {path}: {reason}")


def _open(folder: Path, weights_only: bool) -> SavedCheckpoint:
    saved = open_checkpoint(folder)
    if saved.state is None and not weights_only:
        raise UserError(f"--load {folder}: has no {RUN_STATE}: only its weights can be used; add --finetune")
    return saved
