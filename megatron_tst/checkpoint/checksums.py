"""Checksums of a checkpoint's files, in the format that ``sha256sum --check`` reads."""

from collections.abc import Callable
from pathlib import Path

from megatron_tst.checkpoint.run_state import CONFIG, RUN_STATE
from megatron_tst.config import UserError
from megatron_tst.distributed import ParallelState, every_rank
from megatron_tst.megatron_patches.safe_checkpoint import METADATA
from megatron_tst.megatron_patches.shard_writer import sha256

CHECKSUMS = "SHA256SUMS"
_ENDINGS = (".distcp", ".pt", ".json", ".yaml")


def write_checksums(folder: Path, known: dict[str, str]) -> None:
    """Write the checksums of all files of a checkpoint.

    Args:
        folder: the checkpoint's directory.
        known: known SHA-256 digests by file name; those of other files are computed.
    """
    paths = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    lines = [f"{known.get(path.name) or sha256(path)}  {path.name}\n" for path in paths]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def is_written_here(folder: Path) -> bool:
    """Return whether megatron-tst wrote a checkpoint; such checkpoints have checksums, those of Megatron-LM do not."""
    return any((folder / name).exists() for name in (CHECKSUMS, RUN_STATE, CONFIG))


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file by name.

    Raises:
        UserError: if the checksums are missing or malformed.
    """
    path = folder / CHECKSUMS
    try:
        pairs = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        return {name: digest for digest, name in pairs}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def find_damage(folder: Path, ranks: ParallelState) -> str | None:
    """Compare a checkpoint's files with their checksums; each rank reads a part of the files.

    Collective: every rank of the world calls it.

    Returns:
        A description of the first damage found, or None.
    """
    damage = find_damage_alone(folder, slice(ranks.rank, None, ranks.world_size))
    return next((found for found in every_rank(damage) if found), None)


def find_damage_alone(
    folder: Path, selected: slice = slice(None), on_progress: Callable[[int], object] = lambda _: None
) -> str | None:
    """Compare a checkpoint's files with their checksums in this process alone.

    Args:
        folder: the checkpoint's directory.
        selected: slice of the files to compare, in the order of their names.
        on_progress: function that is called with the number of bytes of each block that is read.

    Returns:
        A description of the first damage found, or None.
    """
    try:
        known = read_checksums(folder)
        return _unlisted(folder, known) or _damage(folder, sorted(known.items())[selected], on_progress)
    except UserError as error:
        return str(error)


def _unlisted(folder: Path, known: dict[str, str]) -> str | None:
    """Return a description of a file that is missing from the checksums, which may be truncated themselves, or None."""
    ours = (path.name for path in folder.iterdir() if path.suffix in _ENDINGS or path.name == METADATA)
    return next(
        (f"{folder / CHECKSUMS} is damaged: it does not list {name}" for name in ours if name not in known), None
    )


def _damage(folder: Path, selected: list[tuple[str, str]], on_progress: Callable[[int], object]) -> str | None:
    for name, digest in selected:
        path = folder / name
        try:
            if sha256(path, on_progress) != digest:
                return f"{path} is damaged: its bytes do not match {CHECKSUMS}"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}"
    return None
