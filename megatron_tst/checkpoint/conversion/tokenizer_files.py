"""The files that make a folder's tokenizer, copied along with weights."""

import json
import shutil
from pathlib import Path

TOKENIZER = "tokenizer.json"
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def copy_tokenizer(tokenizer: Path, target: Path) -> None:
    """Copy a tokenizer, and what lies beside it for the same purpose.

    Args:
        tokenizer: the ``tokenizer.json``.
        target: an existing folder.
    """
    shutil.copyfile(tokenizer, target / TOKENIZER)
    for name in _COMPANIONS:
        companion = tokenizer.with_name(name)
        if companion.is_file():
            shutil.copyfile(companion, target / name)


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
