"""Small checkpoints and their exports, created once per session."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_tst.conversion.saved_checkpoints import find_saved_checkpoint
from megatron_tst.conversion.to_hugging_face import EndOfDocument, Export
from megatron_tst.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from megatron_tst.model import TSTGPTModel
from tests.checkpoint.saved import save_here


@dataclass
class Saved:
    """A checkpoint of one rank.

    Attributes:
        checkpoints: the folder of checkpoints.
        model: the saved model.
        tokenizer: tokenizer of the run.
    """

    checkpoints: Path
    model: TSTGPTModel
    tokenizer: Tokenizer

    def export(self, target: Path, max_shard_bytes: int = 10**9, **settings) -> Path:
        return export(self.checkpoints, target, self.tokenizer, max_shard_bytes, **settings)

    def copy(self, target: Path) -> "Saved":
        """Return a copy that a test may damage."""
        return Saved(Path(shutil.copytree(self.checkpoints, target)), self.model, self.tokenizer)


def export(checkpoints: Path, target: Path, tokenizer: Tokenizer, max_shard_bytes: int = 10**9, **settings) -> Path:
    end = EndOfDocument(tokenizer.eod, END_OF_DOCUMENT)
    saved = find_saved_checkpoint(checkpoints, None, check=None)
    Export(saved, **settings).write(target, tokenizer.path, end, max_shard_bytes)
    return target


@pytest.fixture(scope="session")
def saved(one_rank, tokenizer, tmp_path_factory) -> Callable[..., Saved]:
    """Return a function from a model's name to its checkpoint, which tests must not change."""
    known: dict[tuple[str, bool], Saved] = {}

    def get(name: str, bf16: bool = False) -> Saved:
        if (name, bf16) not in known:
            checkpoints = tmp_path_factory.mktemp("saved") / "checkpoints"
            model = save_here(checkpoints, name, str(tokenizer.path), one_rank, bf16)
            known[name, bf16] = Saved(checkpoints, model, tokenizer)
        return known[name, bf16]

    return get
