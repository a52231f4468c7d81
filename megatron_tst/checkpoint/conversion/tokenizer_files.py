"""The files that make a folder's tokenizer, copied along with weights."""

import json
import shutil
from pathlib import Path

from megatron_tst.config import UserError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer, and a generation config that lies beside it.

    Args:
        source: a folder with ``tokenizer.json``, or that file.
        target: an existing folder.

    Raises:
        UserError: if there is no ``tokenizer.json``.
    """
    folder = source if source.is_dir() else source.parent
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {source}: holds no tokenizer.json")
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def complete_tokenizer(folder: Path, end_of_document: int, end_text: str) -> None:
    """Write what transformers wants beside ``tokenizer.json`` and did not come along.

    Args:
        folder: of the exported model.
        end_of_document: id of the token that ends a text.
        end_text: that token.
    """
    # Without a class by name, transformers guesses one from the model and rebuilds the tokenizer its way.
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_text,
        "clean_up_tokenization_spaces": False,
    }
    for name, contents in (
        ("tokenizer_config.json", tokenizer),
        ("generation_config.json", {"eos_token_id": end_of_document}),
    ):
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
