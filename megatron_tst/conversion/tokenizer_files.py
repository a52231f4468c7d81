"""The files that make a folder's tokenizer, copied along with weights, and the ids of its special tokens."""

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
    """Ids of special tokens, as config.json has them.

    Attributes:
        bos: begins a text.
        eos: ends a text; there may be several.
        pad: fills up a batch.
    """

    bos: int | list[int] | None = None
    eos: int | list[int] | None = None
    pad: int | list[int] | None = None

    @staticmethod
    def from_keys(given: Mapping[str, Any], source: str) -> "TokenIds":
        """Read them from the contents of a file.

        Raises:
            UserError: naming the key whose value is no id, no list of ids and not null.
        """
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = given.get(key)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(isinstance(number, bool) or not isinstance(number, int) for number in ids):
                raise UserError(f"{source}: {key} {value!r}: must be the id of a token, or a list of them")
        return TokenIds(given.get("bos_token_id"), given.get("eos_token_id"), given.get("pad_token_id"))

    def as_keys(self) -> dict[str, int | list[int] | None]:
        """Return the keys of config.json."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}

    def ending_with(self, end_of_document: int) -> "TokenIds":
        """Return the ids with the one that ended the texts of training among those that end a text."""
        ends = self.eos if isinstance(self.eos, list) else [] if self.eos is None else [self.eos]
        if end_of_document in ends:
            return self
        return TokenIds(self.bos, [*ends, end_of_document] if ends else end_of_document, self.pad)


def write_token_ids(folder: Path, token_ids: TokenIds) -> None:
    """Keep the ids of an imported model beside its tokenizer, for an export to find."""
    (folder / TOKEN_IDS).write_text(json.dumps(token_ids.as_keys(), indent=2) + "\n", encoding="utf-8")


def read_token_ids(tokenizer: Path) -> TokenIds:
    """Return the ids that an import kept beside a tokenizer; none of another tokenizer.

    Raises:
        UserError: if they cannot be read.
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


def complete_tokenizer(folder: Path, token_ids: TokenIds, end_text: str) -> None:
    """Write what transformers wants beside ``tokenizer.json`` and did not come along.

    Args:
        folder: of the exported model.
        token_ids: of the special tokens.
        end_text: the token that ends a text.
    """
    # Without a class by name, transformers guesses one from the model and rebuilds the tokenizer its way.
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_text,
        "clean_up_tokenization_spaces": False,
    }
    generation = {key: value for key, value in token_ids.as_keys().items() if value is not None}
    for name, contents in (("tokenizer_config.json", tokenizer), (GENERATION, generation)):
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
