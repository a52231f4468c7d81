"""Tokenizers, read from a Hugging Face ``tokenizer.json`` or trained as a byte-level BPE."""

import functools
import hashlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fastokens
import numpy
import tokenizers
from numpy.typing import NDArray

from megatron_tst.config import UserError
from megatron_tst.data.fast_encoder import LONG_S, find_fast_encoder

END_OF_DOCUMENT = "<|endoftext|>"
# If no tokenizer_config.json names the end-of-sequence token, it is the first of these in the vocabulary.
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "<|eod|>", "</s>", "<eos>")


class Tokenizer:
    """A tokenizer with the interface that training and preprocessing need.

    Attributes:
        path: path of the ``tokenizer.json``.
        vocab_size: the largest id plus one.
        eod: id of the end-of-document token.
    """

    def __init__(self, path: Path, model: tokenizers.Tokenizer, eod: int) -> None:
        """Wrap a loaded tokenizer; use :func:`load_tokenizer` to create one."""
        self.path = path
        self.vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
        self.eod = eod
        self._model = model

    def __getstate__(self) -> dict[str, Any]:
        """Omit the fast encoder, which another process creates for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "fast_encoder"}

    @property
    def sha256(self) -> str:
        """SHA-256 of the ``tokenizer.json``, in hexadecimal."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """The values from which megatron-core derives the names of cached indices."""
        return OrderedDict(tokenizer=str(self.path), vocab_size=str(self.vocab_size))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode texts without adding special tokens."""
        return [encoding.ids for encoding in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_flat(self, texts: list[str]) -> tuple[NDArray[numpy.uint32], NDArray[numpy.int64]]:
        """Encode texts to the same ids as :meth:`encode_batch`, much faster for the usual byte-level BPE.

        Returns:
            The concatenated ids of all texts, and the number of ids of each text.
        """
        if self.fast_encoder is None or any(LONG_S in text for text in texts):
            encoded = self.encode_batch(texts)
            lengths = numpy.fromiter(map(len, encoded), numpy.int64, len(encoded))
            return numpy.fromiter(itertools.chain.from_iterable(encoded), numpy.uint32, lengths.sum()), lengths
        ids, ends = self.fast_encoder.encode_batch_flat(texts)
        return numpy.frombuffer(ids, numpy.uint32), numpy.diff(numpy.frombuffer(ends, numpy.int64)).astype(
            numpy.int64, copy=False
        )

    @functools.cached_property
    def fast_encoder(self) -> fastokens.Tokenizer | None:
        """The library fastokens for this tokenizer, or None if it does not give the same ids."""
        return find_fast_encoder(self._model)

    def token_bytes(self) -> list[int] | None:
        """Return the number of text bytes that each id represents, or None if it depends on other tokens.

        A byte-level token is written with one character per byte. Special tokens represent no text.
        """
        if not isinstance(self._model.decoder, tokenizers.decoders.ByteLevel):
            return None
        added = self._model.get_added_tokens_decoder()
        sizes = [0] * self.vocab_size
        for token, number in self._model.get_vocab(with_added_tokens=True).items():
            sizes[number] = len(token)
        for number, special in added.items():
            sizes[number] = 0 if special.special else len(special.content.encode())
        return sizes

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return str(self._model.decode(ids, skip_special_tokens=False))


def load_tokenizer(name: str, flag: str = "--tokenizer-model") -> Tokenizer:
    """Read a ``tokenizer.json`` without executing anything from it.

    Truncation and padding that the file specifies are switched off: they belong to the inputs of some model, and would
    shorten or lengthen every document.

    Args:
        name: the file, or a directory that holds it.
        flag: the flag that names it, for messages.

    Raises:
        UserError: if there is no such file, it is not a tokenizer, or it has no end-of-document token.
    """
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{flag} {name}: must be a tokenizer.json or a directory that holds one")
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise UserError(f"{flag} {name}: cannot be read as a tokenizer: {error}") from error
    model.no_truncation()
    model.no_padding()
    ends = (_configured_end(path.with_name("tokenizer_config.json"), flag), *KNOWN_ENDS)
    eod = next((model.token_to_id(end) for end in ends if end and model.token_to_id(end) is not None), None)
    if eod is None:
        raise UserError(f"{flag} {name}: has no end-of-document token, such as {', '.join(KNOWN_ENDS)}")
    return Tokenizer(path, model, eod)


def _configured_end(path: Path, flag: str) -> str | None:
    """Return the end-of-sequence token that ``tokenizer_config.json`` names, or None if it names none.

    Raises:
        UserError: if the file cannot be read, or its end-of-sequence token is not text.
    """
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{flag} {path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{flag} {path}: must be a JSON object, not {type(config).__name__}")
    end = config.get("eos_token")
    content = end.get("content") if isinstance(end, dict) else end
    if end is not None and not isinstance(content, str):
        raise UserError(f"{flag} {path}: eos_token {json.dumps(end)}: must be a token's text")
    return content


def check_vocab_size(vocab_size: int) -> None:
    """Check that a vocabulary is large enough for byte-level BPE.

    Raises:
        UserError: if it is too small for all bytes and the end-of-document token.
    """
    if vocab_size < 257:
        raise UserError(
            f"--tst-train-bpe {vocab_size}: must be at least 257, for all bytes and the end-of-document token"
        )


def learn_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Learn a byte-level BPE.

    Args:
        texts: texts to learn from, which are read once.
        vocab_size: size of the vocabulary, at least 257 for all bytes and the end-of-document token.

    Returns:
        The content of the tokenizer's ``tokenizer.json``.

    Raises:
        UserError: if ``vocab_size`` is too small.
    """
    check_vocab_size(vocab_size)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return str(model.to_str(pretty=True))


def save_tokenizer(content: str, path: Path) -> Tokenizer:
    """Write a ``tokenizer.json`` atomically and load it.

    Raises:
        UserError: if the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--tokenizer-model {path}: cannot be written: {error}") from error
    finally:
        if partial.exists():
            partial.unlink()
    return load_tokenizer(str(path))


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Learn a byte-level BPE and write it, as :func:`learn_bpe` and :func:`save_tokenizer` do.

    Raises:
        UserError: if ``vocab_size`` is too small, or the file cannot be written.
    """
    return save_tokenizer(learn_bpe(texts, vocab_size), path)
