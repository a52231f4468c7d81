"""Where a run starts: from scratch, or from a checkpoint that it goes on from."""

import logging
from dataclasses import dataclass

from megatron_tst.checkpoint.changes import Change, find_changes
from megatron_tst.checkpoint.load import FoundCheckpoint, find_checkpoint
from megatron_tst.config import RunConfig, UserError
from megatron_tst.data.build import SourceCut
from megatron_tst.platform import Ranks
from megatron_tst.superposition import Phase, Schedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        schedule: the phases to run.
        step: optimizer steps done already.
        gpu_hours: that these took.
        found: the checkpoint to load, or None.
        cuts: how the text was dealt to the phases, where that is to be continued.
    """

    schedule: Schedule
    step: int = 0
    gpu_hours: float = 0.0
    found: FoundCheckpoint | None = None
    cuts: list[SourceCut] | None = None


def find_start(config: RunConfig, ranks: Ranks) -> Start:
    """Find the checkpoint to start from, and check that this run may go on from it.

    Collective: every rank of the world calls it.

    Raises:
        UserError: if the checkpoint was made with other settings than this run may change.
    """
    found = find_checkpoint(config.checkpoint, ranks)
    if found is None:
        return Start(config.schedule)
    if found.state is None or found.config is None or config.checkpoint.finetune:
        return Start(config.schedule, found=found)
    state, saved = found.state, found.config
    _check_changes(find_changes(saved, config), config, is_main=ranks.is_main)
    if config.checkpoint.override_run_config:
        start = Start(config.schedule, state.iteration, state.gpu_hours, found)
    else:
        _check_phases(saved.phases, config.phases)
        schedule = _prolonged(state.schedule, config.training.train_iters or 0)
        start = Start(
            schedule, state.iteration, state.gpu_hours, found, [SourceCut(**source) for source in state.sources]
        )
    if start.schedule.num_steps < state.iteration:
        raise UserError(f"--train-iters {start.schedule.num_steps}: {found.folder} has {state.iteration} steps done")
    return start


def check_identity(start: Start, *, tokenizer_sha256: str, vocab_size: int, global_batch_size: int) -> None:
    """Check that what a checkpoint's run was built on is what this run is built on.

    Args:
        start: as :func:`find_start` returned it.
        tokenizer_sha256: of the tokenizer file.
        vocab_size: tokens of the vocabulary, before padding.
        global_batch_size: sequences per step.

    Raises:
        UserError: naming the first thing that differs.
    """
    state = start.found.state if start.found else None
    if state is None:
        return
    if state.vocab_size != vocab_size:
        raise UserError(f"--vocab-size {vocab_size}: the checkpoint's vocabulary has {state.vocab_size} tokens")
    if start.cuts is None:
        return
    if state.global_batch_size != global_batch_size:
        raise UserError(
            f"--global-batch-size {global_batch_size}: the checkpoint was made with {state.global_batch_size}; "
            "to read other text than the run would have, add --override-run-config"
        )
    if state.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"--tokenizer-model: is not the one that the checkpoint was made with ({state.tokenizer}); "
            "to go on with another, add --override-run-config"
        )


def _check_changes(changes: list[Change], config: RunConfig, is_main: bool) -> None:
    for change in changes:
        is_shape = change.name.startswith("model.") and change.name != "model.seq_length"
        is_optimizer_shape = change.name in ("training.bf16", "optimizer.use_distributed_optimizer")
        if change.is_binding and is_shape:
            raise UserError(f"{change}; another model cannot load it")
        if is_optimizer_shape and not config.checkpoint.no_load_optim:
            raise UserError(f"{change}; its optimizer state has another shape, add --no-load-optim to leave it")
        if change.is_binding and not is_optimizer_shape and not config.checkpoint.override_run_config:
            raise UserError(f"{change}; to go on nevertheless, add --override-run-config")
        if is_main:
            logger.info("changed: %s", change)


def _check_phases(saved: tuple[Phase, ...], wanted: tuple[Phase, ...]) -> None:
    """Refuse phases in the YAML file that differ in more than the length of the last."""
    kinds = [[(phase.bag_size, phase.reads_bags) for phase in phases] for phases in (saved, wanted)]
    lengths = [[phase.num_steps for phase in phases[:-1]] for phases in (saved, wanted)]
    if kinds[0] != kinds[1] or lengths[0] != lengths[1]:
        raise UserError(
            f"phases: differ from the checkpoint's {[(phase.bag_size, phase.num_steps) for phase in saved]} in more "
            "than the steps of the last; to go on nevertheless, add --override-run-config"
        )


def _prolonged(schedule: Schedule, num_steps: int) -> Schedule:
    """Return the phases with the last one made longer or shorter, so that the run has ``num_steps`` steps."""
    *before, last = schedule.phases
    steps = num_steps - sum(phase.num_steps for phase in before)
    if steps < 1:
        raise UserError(f"--train-iters {num_steps}: ends before the checkpoint's last phase begins")
    return Schedule((*before, Phase(last.bag_size, steps, last.reads_bags)))
