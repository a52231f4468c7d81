"""Where a run starts: from scratch, or from a checkpoint that it goes on from."""

import logging
from dataclasses import dataclass

from megatron_tst.checkpoint.changes import check_changes, check_phases, find_changes, prolonged
from megatron_tst.checkpoint.find import find_checkpoint
from megatron_tst.checkpoint.saved_checkpoint import SavedCheckpoint
from megatron_tst.config import RunConfig, UserError
from megatron_tst.data.document_split import DocumentSplit
from megatron_tst.distributed import ParallelState
from megatron_tst.shape import pad_vocabulary
from megatron_tst.superposition import Schedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        schedule: the phases to run.
        step: optimizer steps done already.
        gpu_hours: that these took.
        found: the checkpoint to load, or None.
        splits: how the documents were split among the phases, where that is to be continued.
    """

    schedule: Schedule
    step: int = 0
    gpu_hours: float = 0.0
    found: SavedCheckpoint | None = None
    splits: list[DocumentSplit] | None = None


def find_start(config: RunConfig, ranks: ParallelState) -> Start:
    """Find the checkpoint to start from, and check that this run may go on from it.

    Collective: every rank of the world calls it.

    Raises:
        UserError: if the checkpoint was made with other settings than this run may change.
    """
    found = find_checkpoint(config.checkpoint, ranks)
    if found is None:
        return Start(config.schedule)
    if found.state is None or found.config is None or config.checkpoint.finetune:
        _check_model(found, config, is_main=ranks.is_main)
        return Start(config.schedule, found=found)
    state, saved = found.state, found.config
    check_changes(find_changes(saved, config), config.checkpoint, is_main=ranks.is_main)
    if config.checkpoint.override_run_config:
        start = Start(config.schedule, state.iteration, state.gpu_hours, found)
    else:
        check_phases(saved.phases, config.phases)
        schedule = prolonged(state.schedule, config.training.train_iters or 0)
        start = Start(
            schedule, state.iteration, state.gpu_hours, found, list(map(DocumentSplit.from_saved, state.sources))
        )
    if start.schedule.num_steps < state.iteration:
        raise UserError(f"--train-iters {start.schedule.num_steps}: {found.folder} has {state.iteration} steps done")
    return start


def choose_vocab_size(start: Start, config: RunConfig, tokenizer_size: int, tp_size: int) -> int:
    """Return the tokens of the run's vocabulary, before padding.

    It is ``--vocab-size``; where that is not given, the tokenizer's or, if that is larger, the checkpoint's: published
    models often have more rows than their tokenizers have tokens, and the model computes with them.

    Args:
        start: as :func:`find_start` returned it.
        config: the run's settings.
        tokenizer_size: tokens that the tokenizer knows.
        tp_size: tensor-parallel ranks.

    Raises:
        UserError: if the tokenizer knows more, or the checkpoint has another vocabulary.
    """
    saved = start.found.vocab_size if start.found else None
    size = config.model.vocab_size or max(tokenizer_size, saved or 0)
    if size < tokenizer_size:
        raise UserError(f"--vocab-size {size}: must be at least the tokenizer's {tokenizer_size}")
    padded = pad_vocabulary(size, config.model.make_vocab_size_divisible_by * tp_size)
    wrong = _find_wrong_vocabulary(start.found, size, padded) if start.found else None
    settings = config.checkpoint
    if wrong and not (settings.finetune and settings.override_run_config):
        instead = "; to cut rows off, or add rows of zeros, add --override-run-config" if settings.finetune else ""
        raise UserError(f"--vocab-size {size}: {wrong}{instead}")
    return size


def _find_wrong_vocabulary(found: SavedCheckpoint, size: int, padded: int) -> str | None:
    """Say why a checkpoint's vocabulary is not that of the run, or None."""
    if found.vocab_size is not None:
        is_same = found.vocab_size == size
        return None if is_same else f"the checkpoint's vocabulary has {found.vocab_size} tokens"
    rows = found.num_embedding_rows
    if size <= rows <= padded:
        return None
    return (
        f"the checkpoint's table has {rows} rows; give its vocabulary, or a --make-vocab-size-divisible-by that pads "
        "to as many"
    )


def check_identity(start: Start, *, tokenizer_sha256: str, global_batch_size: int) -> None:
    """Check that the text of a run that goes on is dealt as before.

    Args:
        start: as :func:`find_start` returned it.
        tokenizer_sha256: of the tokenizer file.
        global_batch_size: sequences per step.

    Raises:
        UserError: naming the first thing that differs.
    """
    state = start.found.state if start.found else None
    if state is None or start.splits is None:
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


def _check_model(found: SavedCheckpoint, config: RunConfig, is_main: bool) -> None:
    """Refuse a model that computes something else with the weights than the one that they were trained as."""
    changes = [] if found.config is None else find_changes(found.config, config)
    different = [str(change) for change in changes if change.alters_model]
    different += [f"the checkpoint was made with {argument}, which no model here has" for argument in found.foreign]
    if different and not config.checkpoint.override_run_config:
        raise UserError(
            f"{'; '.join(different)}; to take its weights nevertheless, as another function, add --override-run-config"
        )
    for difference in different if is_main else ():
        logger.info("changed: %s", difference)
