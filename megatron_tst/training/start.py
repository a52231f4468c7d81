"""Decides where a run starts: from scratch or from a checkpoint."""

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
        schedule: phases to run.
        step: number of optimizer steps that are already done.
        gpu_hours: GPU-hours of the steps that are already done.
        found: checkpoint to load, or None.
        splits: document splits of the checkpoint; None if the documents are to be split anew.
    """

    schedule: Schedule
    step: int = 0
    gpu_hours: float = 0.0
    found: SavedCheckpoint | None = None
    splits: list[DocumentSplit] | None = None


def find_start(config: RunConfig, ranks: ParallelState) -> Start:
    """Find the checkpoint to start from, and check that this run may continue from it.

    Collective: every rank of the world calls it.

    Raises:
        UserError: if a setting that must not change differs from the checkpoint's.
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
        raise UserError(f"--train-iters {start.schedule.num_steps}: {found.folder} is from step {state.iteration}")
    return start


def choose_vocab_size(start: Start, config: RunConfig, tokenizer_size: int, tp_size: int) -> int:
    """Return the number of tokens in the run's vocabulary, before padding.

    It is ``--vocab-size`` if that is given, otherwise the larger of the tokenizer's and the checkpoint's vocabulary:
    published models often have more rows than their tokenizers have tokens, and the model computes with these rows.

    Args:
        start: result of :func:`find_start`.
        config: settings of the run.
        tokenizer_size: number of tokens that the tokenizer knows.
        tp_size: number of tensor-parallel ranks.

    Raises:
        UserError: if the tokenizer has more tokens, or the checkpoint has another vocabulary.
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
    """Return why a checkpoint's vocabulary does not match the run's, or None if it does."""
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


def _check_model(found: SavedCheckpoint, config: RunConfig, is_main: bool) -> None:
    """Refuse a model that computes another function of the weights than the model that they were trained in."""
    changes = [] if found.config is None else find_changes(found.config, config)
    different = [str(change) for change in changes if change.alters_model]
    different += [f"the checkpoint was made with {argument}, which no model here has" for argument in found.foreign]
    if different and not config.checkpoint.override_run_config:
        raise UserError(
            f"{'; '.join(different)}; to load its weights into this different model, add --override-run-config"
        )
    for difference in different if is_main else ():
        logger.info("changed: %s", difference)
