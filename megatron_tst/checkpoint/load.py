"""Loading: the newest whole checkpoint is found and checked, then every rank reads its shards of it."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tst.checkpoint.checksums import find_damage
from megatron_tst.checkpoint.content import (
    Trainables,
    list_generators,
    list_model,
    list_optimizer,
    put_generators,
    put_model,
    put_optimizer,
    without_shards,
)
from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.checkpoint.run_state import RUN_STATE, RunState, read_run_state, read_saved_config
from megatron_tst.config import CheckpointSettings, RunConfig, UserError
from megatron_tst.platform import Ranks, main_rank_alone
from megatron_tst.platform.safe_checkpoint import METADATA, read_metadata, safe_loading

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint to start from.

    Attributes:
        folder: of it.
        state: where its run stood; None for weights that are not of a run of ours.
        config: the settings of its run, likewise.
    """

    folder: Path
    state: RunState | None
    config: RunConfig | None


def find_checkpoint(settings: CheckpointSettings, ranks: Ranks) -> FoundCheckpoint | None:
    """Find the checkpoint that ``--load`` asks for; one that is damaged is passed over for the one before.

    Collective: every rank of the world calls it.

    Returns:
        The newest whole checkpoint, not beyond the one that the tracker names; None if there is none at all.

    Raises:
        UserError: if there are checkpoints and none is whole, or the one asked for by ``--ckpt-step`` is not.
    """
    if settings.load is None:
        return None
    folders = CheckpointFolders(Path(settings.load))
    # One rank looks and all believe it: a network file system may show ranks different things for a while.
    candidates = main_rank_alone(lambda: _candidates(folders, settings.ckpt_step))
    for folder, is_foreign in candidates:
        damage = None if settings.no_verify_checkpoint or is_foreign else find_damage(folder, ranks)
        if damage is None:
            return main_rank_alone(lambda folder=folder: _open(folder, settings.finetune))  # type: ignore[misc]
        if ranks.is_main:
            logger.warning("WARNING: %s; it is left as it is, and the checkpoint before it is tried", damage)
    if candidates:
        raise UserError(f"--load {settings.load}: none of its {len(candidates)} checkpoints is whole")
    if settings.exit_on_missing_checkpoint:
        raise UserError(f"--load {settings.load}: holds no checkpoint (--exit-on-missing-checkpoint)")
    return None


def _candidates(folders: CheckpointFolders, wanted: int | None) -> list[tuple[Path, bool]]:
    """Return the checkpoints to try, best first, and whether they are of no run of ours."""
    steps, latest = folders.steps(), folders.latest()
    if wanted is not None:
        if wanted not in steps:
            raise UserError(f"--ckpt-step {wanted}: {folders.path} holds {steps or 'no checkpoints'}")
        latest, steps = wanted, [wanted]
    if latest is None and steps:
        logger.warning("WARNING: %s is missing or names no step: the newest checkpoint is taken", folders.tracker)
    # A tracker set back by hand is obeyed.
    wanted_folders = [folders.of(step) for step in reversed(steps) if latest is None or step <= latest]
    return [(folder, _is_foreign(folder)) for folder in wanted_folders]


def _is_foreign(folder: Path) -> bool:
    """Whether a checkpoint was not made by a run of ours; Megatron-LM writes no checksums."""
    return (folder / METADATA).exists() and not (folder / RUN_STATE).exists()


def _open(folder: Path, weights_only: bool) -> FoundCheckpoint:
    if not _is_foreign(folder):
        return FoundCheckpoint(folder, read_run_state(folder), read_saved_config(folder))
    if not weights_only:
        raise UserError(f"--load {folder}: has no {RUN_STATE}: only its weights can be used, add --finetune")
    return FoundCheckpoint(folder, None, None)


def load_checkpoint(
    found: FoundCheckpoint, trainables: Trainables, *, with_optimizer: bool, with_generators: bool
) -> None:
    """Put a checkpoint's content into a model, its optimizer and this rank's generators.

    Collective: every rank of the world calls it.

    Args:
        found: what to load.
        trainables: what to put it into.
        with_optimizer: whether to load optimizer state; else the optimizer starts from the loaded weights.
        with_generators: whether to load generators; left as they are where the parallel layout is another.

    Raises:
        UserError: if the checkpoint holds another model, or cannot be read.
    """
    model = list_model(trainables)
    wanted: dict[str, Any] = dict(model)
    absent = _take_absent_states(model, found.folder)
    if with_optimizer:
        # Under a name of its own: the checkpoint's plain values, of perhaps another layout, come back as "optimizer".
        wanted["optimizer_shards"] = list_optimizer(trainables, model, is_loading=True)
        own = without_shards(wanted["optimizer_shards"])
    with_generators = with_generators and found.state is not None and found.state.layout == trainables.ranks.layout
    if with_generators:
        wanted["rng_state"] = list_generators(trainables.ranks)
    try:
        with safe_loading():
            loaded = dist_checkpointing.load(wanted, str(found.folder), _sharing(trainables.ranks))
    except (CheckpointingException, CheckpointException, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"--load {found.folder}: cannot be loaded: {_reason(error)}", own_rank=True) from error
    for part, names in absent.items():
        loaded[part].update(dict.fromkeys(names))
    put_model(trainables, loaded)
    if with_optimizer:
        put_optimizer(trainables, loaded["optimizer_shards"], own, loaded["optimizer"])
    else:
        trainables.optimizer.reload_model_params()
    if with_generators:
        put_generators(loaded["rng_state"])


def _sharing(ranks: Ranks) -> FullyParallelLoadStrategyWrapper:
    """Let data-parallel ranks share the reading of what they all need, and hand it on to each other.

    Tensors travel one at a time, by broadcast: the other ways hold all of them twice, or gather tensors of unequal
    sizes, which gloo does not.
    """
    strategy = TorchDistLoadShardedStrategy()
    return FullyParallelLoadStrategyWrapper(strategy, ranks.groups.dp_cp, exchange_algo="broadcast")


def _take_absent_states(model: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    """Take from the list of what to load the modules' states that are no tensors and that the checkpoint lacks.

    Transformer Engine's attention asks for one, which holds nothing without FP8; checkpoints of other layers have none.
    """
    known = read_metadata(folder).state_dict_metadata
    absent = {}
    for part, entries in model.items():
        absent[part] = [
            name
            for name, entry in entries.items()
            if isinstance(entry, ShardedObject) and entry.unique_key not in known
        ]
        for name in absent[part]:
            del entries[name]
    return absent


def _reason(error: BaseException) -> str:
    """Return the first line that says what went wrong."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
