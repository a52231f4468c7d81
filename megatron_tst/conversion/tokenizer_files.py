"""Copies the files of a tokenizer along with the weights, and keeps the ids of its special tokens."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tst.config import UserError

TOKENIZER, TOKEN_IDS, GENERATION = "tokenizer.json", "token_ids.json", "generation_config.json"
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    GENERATION,
)


@dataclass(frozen=True)
class TokenIds:
    """Ids of special tokens, in the form of config.json.

    Attributes:
        bos: id of the token that begins a text.
        eos: id or ids of the tokens that end a text.
        pad: id of the token that pads a batch.
    """

    bos: int | list[int] | None = None
    eos: int | list[int] | None = None
    pad: int | list[int] | None = None

    @staticmethod
    def from_keys(given: Mapping[str, Any], source: str) -> "TokenIds":
        """Read the ids from the contents of a file.

        Raises:
            UserError: naming the key whose value is neither an id, a list of ids nor null.
        """
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = given.get(key)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(isinstance(number, bool) or not isinstance(number, int) for number in ids):
                raise UserError(f"{source}: {key} {value!r}: must be the id of a token, or a list of them")
        return TokenIds(given.get("bos_token_id"), given.get("eos_token_id"), given.get("pad_token_id"))

    def as_keys(self) -> dict[str, int | list[int] | None]:
        """Return the ids under the keys of config.json."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}

    def ending_with(self, end_of_document: int) -> "TokenIds":
        """Return the ids with the end-of-document token of training added to those that end a text."""
        ends = self.eos if isinstance(self.eos, list) else [] if self.eos is None else [self.eos]
        if end_of_document in ends:
            return self
        return TokenIds(self.bos, [*ends, end_of_document] if ends else end_of_document, self.pad)


def write_token_ids(folder: Path, token_ids: TokenIds) -> None:
    """Write the ids of an imported model next to its tokenizer, where an export finds them."""
    (folder / TOKEN_IDS).write_text(json.dumps(token_ids.as_keys(), indent=2) + "\n", encoding="utf-8")


def read_token_ids(tokenizer: Path) -> TokenIds:
    """Return the ids that an import wrote next to a tokenizer, or no ids if there are none.

    Raises:
        UserError: if the ids cannot be read.
    """
    path = tokenizer.with_name(TOKEN_IDS)
    if not path.is_file():
        return TokenIds()
    try:
        contents = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return TokenIds.from_keys(contents, str(path))


def copy_tokenizer(tokenizer: Path, target: Path) -> None:
    """Copy a tokenizer and its companion files.

    Args:
        tokenizer: the ``tokenizer.json``.
        target: an existing folder.
    """
    shutil.copyfile(tokenizer, target / TOKENIZER)
    for name in _COMPANIONS:
        companion = tokenizer.with_name(name)
        if companion.is_file():
            shutil.copyfile(companion, target / name)


def complete_tokenizer(folder: Path, token_ids: TokenIds, end_text: str) -> None:
    """Write the companion files that transformers needs and that were not copied.

    Args:
        folder: folder of the exported model.
        token_ids: ids of the special tokens.
        end_text: text of the end-of-document token.
    """
    # Without the name of a class, transformers guesses one from the model and rebuilds the tokenizer differently.
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_text,
        "clean_up_tokenization_spaces": False,
    }
    generation = {key: value for key, value in token_ids.as_keys().items() if value is not None}
    for name, contents in (("tokenizer_config.json", tokenizer), (GENERATION, generation)):
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
