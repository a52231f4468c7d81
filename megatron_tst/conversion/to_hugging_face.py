"""Converts a checkpoint to a Hugging Face folder."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_tst.checkpoint.saved_checkpoint import SavedCheckpoint
from megatron_tst.config import UserError, require
from megatron_tst.conversion.casting import Casting
from megatron_tst.conversion.safetensors_files import Weight, write_shards
from megatron_tst.conversion.settings import architecture_of, config_json
from megatron_tst.conversion.tables import EMBEDDING, Row, pieces
from megatron_tst.conversion.tokenizer_files import complete_tokenizer, copy_tokenizer, read_token_ids
from megatron_tst.conversion.torch_dist import Index, StackedWeights
from megatron_tst.conversion.whole_folder import whole_folder
from megatron_tst.shape import ModelShape, resolve_shape

# Tensors of a checkpoint that belong to the optimizer.
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


@dataclass(frozen=True)
class EndOfDocument:
    """The end-of-document token, as id and as text."""

    id: int
    text: str


class Export:
    """A checkpoint that was checked against its settings and is ready to be written.

    Attributes:
        weights: weights to write, in order.
        casting: casting of the weights, which records rounded and non-finite values.
    """

    def __init__(self, saved: SavedCheckpoint, dtype: torch.dtype | None = None) -> None:
        """Compare the checkpoint with the table of its architecture.

        Args:
            saved: the checkpoint.
            dtype: type of the written weights; None keeps each weight's own type.

        Raises:
            UserError: if no architecture fits, or a weight is missing, not in the table, or has another size.
        """
        self._model = saved.model
        self._vocab_size = require("--vocab-size", saved.vocab_size)
        self._stored = StackedWeights(saved.folder)
        self._folder, self.casting = saved.folder, Casting(dtype)
        tied = not self._model.untie_embeddings_and_output_weights
        self._rows = architecture_of(self._model).rows_of(tied)
        self._shape = self._check(saved.folder)
        self.weights = [weight for row, index in pieces(self._rows, self._shape) for weight in self._coming(row, index)]

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all weights."""
        return sum(weight.num_bytes for weight in self.weights)

    def write(
        self,
        target: Path,
        tokenizer: Path,
        end_of_document: EndOfDocument,
        max_shard_bytes: int,
        force: bool = False,
        on_progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Write the Hugging Face folder; it appears whole or not at all.

        Args:
            target: the folder.
            tokenizer: the ``tokenizer.json`` to copy.
            end_of_document: the end-of-document token.
            max_shard_bytes: largest number of weight bytes in a file.
            force: whether an earlier export may be replaced.
            on_progress: called with the number of bytes of each written weight.

        Raises:
            UserError: if the checkpoint is damaged, a value overflows its new type, or the folder cannot be written.
        """
        dtype = str(self.weights[0].dtype).removeprefix("torch.")
        token_ids = read_token_ids(tokenizer).ending_with(end_of_document.id)
        config = config_json(self._model, self._vocab_size, token_ids, dtype)
        with whole_folder(target, self._folder, self.num_bytes, force) as folder:
            copy_tokenizer(tokenizer, folder)
            complete_tokenizer(folder, token_ids, end_of_document.text)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            tensors = itertools.chain.from_iterable(
                self._convert(row, index) for row, index in pieces(self._rows, self._shape)
            )
            write_shards(folder, self.weights, tensors, max_shard_bytes, on_progress)

    def _check(self, folder: Path) -> ModelShape:
        stored = {key: entry for key, entry in self._stored.entries.items() if not _OPTIMIZER.match(key)}
        table = {row.megatron for row in self._rows}
        for key in sorted(stored.keys() ^ table):
            where = "is not in the table of its architecture" if key in stored else "is missing"
            raise UserError(f"{folder}: {key}: {where}, {architecture_of(self._model).name}")
        shape = dataclasses.replace(
            resolve_shape(self._model, self._vocab_size), padded_vocab_size=stored[EMBEDDING].size[0]
        )
        for row in self._rows:
            wanted = (*row.stacked(shape), *row.megatron_size(shape))
            if tuple(stored[row.megatron].size) != wanted:
                found = list(stored[row.megatron].size)
                raise UserError(f"{folder}: {row.megatron}: has shape {found}, but the settings need {list(wanted)}")
        if shape.padded_vocab_size < shape.vocab_size:
            raise UserError(f"{folder}: {EMBEDDING}: has {shape.padded_vocab_size} rows for {shape.vocab_size} tokens")
        return shape

    def _coming(self, row: Row, index: Index) -> Iterator[Weight]:
        dtype = self.casting.dtype or self._stored.entries[row.megatron].properties.dtype
        for name, size in zip(row.names(index), row.hugging_face_sizes(self._shape), strict=True):
            yield Weight(name, size, dtype)

    def _convert(self, row: Row, index: Index) -> Iterator[Tensor]:
        weight = self._stored.read(row.megatron, index)
        for name, part in zip(row.names(index), row.transformation.split(weight, self._shape), strict=True):
            yield self.casting(name, part, default=part.dtype)
