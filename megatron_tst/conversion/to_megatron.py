"""Converts a Hugging Face folder to a checkpoint of weights from which a run can start."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.config import DataSettings, RunConfig, TrainingSettings, UserError
from megatron_tst.conversion.casting import Casting
from megatron_tst.conversion.safetensors_files import SafetensorsFolder
from megatron_tst.conversion.saved_checkpoints import complete_weights
from megatron_tst.conversion.settings import read_config_json
from megatron_tst.conversion.tables import Row, pieces
from megatron_tst.conversion.tokenizer_files import GENERATION, copy_tokenizer, write_token_ids
from megatron_tst.conversion.torch_dist import Index, Slice, write_stacked
from megatron_tst.conversion.whole_folder import whole_folder
from megatron_tst.shape import resolve_shape

# Buffers that old versions of transformers saved with the weights; they follow from rope_theta.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")
# Tensors that hold all experts of a layer, as transformers 5 keeps them in memory.
_FUSED = re.compile(r"\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj)\b")
_LINEAR = re.compile(r"\.linear_\w+$")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Import:
    """A Hugging Face folder that was checked against its config.json and is ready to be written.

    Attributes:
        model: settings of the model.
        num_bytes: number of bytes of all weights.
        casting: casting of the weights, which records rounded and non-finite values.
    """

    def __init__(self, source: Path, dtype: torch.dtype | None = None) -> None:
        """Compare the weights with the table of their architecture.

        Args:
            source: the Hugging Face folder.
            dtype: type of the written weights; None keeps each weight's own type.

        Raises:
            UserError: if config.json cannot be converted, or a weight is missing, not in the table, or has another
                size.
        """
        path = source / "config.json"
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--load {source}: is not a Hugging Face folder: config.json: {error}") from error
        if not isinstance(contents, dict):
            raise UserError(f"--load {source}: is not a Hugging Face folder: config.json holds no object")
        architecture, self.model, self._token_ids = read_config_json(contents, str(path))
        self._shape = resolve_shape(self.model)
        self._tied = self._shape.is_tied
        self._rows = architecture.rows_of(self._tied)
        self._source, self.casting = source, Casting(dtype)
        self._given = SafetensorsFolder(source)
        self._check(architecture.name)
        self._slices = [self._slice(row, index) for row, index in pieces(self._rows, self._shape)]
        self.num_bytes = sum(math.prod(piece.size) * piece.dtype.itemsize for piece in self._slices)

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._shape.vocab_size

    def write(
        self,
        target: Path,
        tokenizer: Path,
        force: bool = False,
        on_progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Write the folder of checkpoints with the tokenizer in it; it appears whole or not at all.

        Args:
            target: the folder.
            tokenizer: the ``tokenizer.json`` to copy.
            force: whether an earlier import may be replaced.
            on_progress: called with the number of bytes of each written weight.

        Raises:
            UserError: if a weight cannot be read, a value overflows its new type, or the folder cannot be written.
        """
        first = CheckpointFolders(target).of(0).name
        with whole_folder(target, self._source, self.num_bytes, force) as folder:
            for name in (first, "tokenizer"):
                (folder / name).mkdir()
            self._copy_tokenizer(tokenizer, folder / "tokenizer")
            write_stacked(folder / first, self._slices, self._empty_states(), on_progress)
            config = RunConfig(
                model=self.model,
                data=DataSettings(tokenizer_model=str((target / "tokenizer").resolve())),
                training=TrainingSettings(bf16=self._slices[0].dtype == torch.bfloat16),
            )
            complete_weights(folder, config)

    def _copy_tokenizer(self, tokenizer: Path, target: Path) -> None:
        """Copy the tokenizer, and the model's own ids of special tokens, even if the tokenizer is another one."""
        copy_tokenizer(tokenizer, target)
        write_token_ids(target, self._token_ids)
        if (self._source / GENERATION).is_file():
            shutil.copyfile(self._source / GENERATION, target / GENERATION)

    def _check(self, architecture: str) -> None:
        if self._tied and _HEAD in self._given.weights and _EMBEDDING not in self._given.weights:
            self._given.rename(_HEAD, _EMBEDDING)  # a saver that drops one of two tied tables may keep this one
        given = {name: weight for name, weight in self._given.weights.items() if not _DERIVED.fullmatch(name)}
        if self._tied and _HEAD in given:
            del given[_HEAD]
            if not torch.equal(self._given.read(_HEAD), self._given.read(_EMBEDDING)):
                raise UserError(f"{self._source}: {_HEAD}: differs from {_EMBEDDING}, but config.json ties them")
        table = {
            name: size
            for row, index in pieces(self._rows, self._shape)
            for name, size in zip(row.names(index), row.hugging_face_sizes(self._shape), strict=True)
        }
        fused = next((name for name in sorted(given) if _FUSED.search(name)), None)
        if fused:
            raise UserError(
                f"{self._source}: {fused}: holds all experts of a layer; only one weight per expert is supported"
            )
        for name in sorted(given.keys() ^ table.keys()):
            where = "is not in the table of its architecture" if name in given else "is missing"
            raise UserError(f"{self._source}: {name}: {where}, {architecture}")
        for name, size in table.items():
            if given[name].size != size:
                found = list(given[name].size)
                raise UserError(f"{self._source}: {name}: has shape {found}, but config.json needs {list(size)}")

    def _slice(self, row: Row, index: Index) -> Slice:
        stacked = row.stacked(self._shape)
        # A stacked tensor has a single type, that of its first weight.
        first = row.names(tuple(0 for _ in stacked))[0]
        dtype = self.casting.dtype or self._given.weights[first].dtype

        def load() -> Tensor:
            """Read the weight's parts and join them."""
            parts = [self.casting(name, self._given.read(name), default=dtype) for name in row.names(index)]
            return row.transformation.join(parts, self._shape)

        return Slice(row.megatron, stacked, index, row.megatron_size(self._shape), dtype, load)

    def _empty_states(self) -> Iterator[str]:
        """Yield the keys of the modules' extra states, which a load expects; they are empty without FP8."""
        for row in self._rows:
            module = row.megatron.removesuffix(".weight")
            lengths = row.stacked(self._shape)
            # Transformer Engine's attention has no weight, but it has an extra state.
            attention = module.replace("linear_proj", "core_attention")
            for owner in sorted({module, attention}) if _LINEAR.search(module) else ():
                for index in itertools.product(*map(range, lengths)):
                    places = (".".join(map(str, numbers)) for numbers in (index, lengths))
                    yield f"{owner}._extra_state/shard_{'_'.join(places)}"
