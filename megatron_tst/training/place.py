"""Chooses where a run writes, and refuses folders that belong to another run."""

from pathlib import Path

from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.config import RunConfig, UserError
from megatron_tst.telemetry import RunDirectory
from megatron_tst.training.start import Start


def choose_place(directory: RunDirectory, config: RunConfig, start: Start) -> CheckpointFolders:
    """Return the folder of the run's checkpoints; called before anything is written and before any long work.

    Args:
        directory: directory of the run.
        config: settings of the run.
        start: where the run starts.

    Raises:
        UserError: if the run directory or the folder of ``--save`` is in use by a run that this one does not continue,
            or if it cannot be written.
    """
    settings = config.checkpoint
    folders = CheckpointFolders(Path(settings.save or directory.checkpoints))
    # Lock the folder first: another run in it may save its first checkpoint at any moment.
    directory.occupy_checkpoints(folders.path)
    # These are the run's own checkpoints: it continues in its folder, even if it stopped before it saved one.
    if settings.load is not None and not settings.finetune and _is_same(settings.load, folders.path):
        return folders
    if start.step and start.found is not None and _is_same(start.found.folder.parent, directory.checkpoints):
        raise UserError(
            f"--save {folders.path}: the run's checkpoints are in {directory.checkpoints}; save there, or move them"
        )
    directory.refuse_used()
    if steps := folders.steps():
        place = f"--save {settings.save}" if settings.save else f"--tst-run-dir {directory.path}"
        raise UserError(
            f"{place}: already holds a run's checkpoints, of the steps {steps}; choose another, or continue with "
            f"--load {folders.path}"
        )
    return folders


def _is_same(path: Path | str, other: Path) -> bool:
    return Path(path).resolve() == other.resolve()
