"""The information that a checkpoint holds besides its tensors, whatever program wrote it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_tst.checkpoint.checksums import is_written_here
from megatron_tst.checkpoint.run_state import (
    CONFIG,
    RUN_STATE,
    RunState,
    read_run_state,
    read_saved_arguments,
    read_saved_config,
)
from megatron_tst.checkpoint.stock_arguments import find_foreign, model_settings
from megatron_tst.config import ModelSettings, RunConfig, UserError
from megatron_tst.megatron_patches.safe_checkpoint import read_metadata

_TOKEN_TABLE = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class SavedCheckpoint:
    """One checkpoint, of a run, of imported weights, or written by Megatron-LM itself.

    Attributes:
        folder: the checkpoint's directory, ``iter_0000123``.
        state: the run state; None for weights without a run of this project.
        config: settings of the run, or of the model alone; None if they are unknown.
        vocab_size: tokens in the vocabulary, before padding; None if unknown.
        tokenizer: file or directory of the tokenizer; None if unknown.
        foreign: Megatron-LM arguments that no model here supports, as ``name=value``.
        has_checksums: whether the files can be compared with checksums, which Megatron-LM does not write.
    """

    folder: Path
    state: RunState | None
    config: RunConfig | None
    vocab_size: int | None
    tokenizer: Path | None
    foreign: tuple[str, ...] = ()
    has_checksums: bool = True

    @property
    def model(self) -> ModelSettings:
        """The settings of the model.

        Raises:
            UserError: if they are unknown, or the model computes something that no model here supports.
        """
        if self.config is None:
            raise UserError(
                f"{self.folder}: has neither {CONFIG} nor Megatron-LM's args, so its model's settings are unknown"
            )
        if self.foreign:
            raise UserError(f"{self.folder}: was made with {'; '.join(self.foreign)}, which no model here supports")
        return self.config.model

    @property
    def num_embedding_rows(self) -> int:
        """Number of rows of the token embedding, including padding.

        Raises:
            UserError: if the checkpoint has no token embedding.
        """
        table = read_metadata(self.folder).state_dict_metadata.get(_TOKEN_TABLE)
        if not isinstance(table, TensorStorageMetadata):
            raise UserError(f"{self.folder}: holds no {_TOKEN_TABLE}")
        return int(table.size[0])


def open_checkpoint(folder: Path) -> SavedCheckpoint:
    """Read the information that a checkpoint holds besides its tensors.

    Raises:
        UserError: if one of the files is malformed.
    """
    has_checksums = is_written_here(folder)
    if (folder / RUN_STATE).exists():
        state = read_run_state(folder)
        tokenizer, config = Path(state.tokenizer), read_saved_config(folder)
        return SavedCheckpoint(folder, state, config, state.vocab_size, tokenizer, has_checksums=has_checksums)
    if (folder / CONFIG).exists():
        config = read_saved_config(folder)
        named, vocab_size = config.data.tokenizer_model, config.model.vocab_size
        return SavedCheckpoint(
            folder, None, config, vocab_size, Path(named) if named else None, has_checksums=has_checksums
        )
    return _open_stock(folder)


def _open_stock(folder: Path) -> SavedCheckpoint:
    """Describe a checkpoint of Megatron-LM by its ``args``."""
    arguments = read_saved_arguments(folder)
    if arguments is None:
        return SavedCheckpoint(folder, None, None, None, None, has_checksums=False)
    # The vocabulary in the checkpoint is padded already.
    model = dataclasses.replace(model_settings(arguments), make_vocab_size_divisible_by=1)
    named = arguments.get("tokenizer_model")
    return SavedCheckpoint(
        folder,
        state=None,
        config=RunConfig(model=model),
        vocab_size=None,
        tokenizer=Path(named) if named else None,
        foreign=tuple(find_foreign(arguments)),
        has_checksums=False,
    )
