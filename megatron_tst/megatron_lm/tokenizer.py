"""The tokenizer of a run: this project's for a ``tokenizer.json``, otherwise the one that Megatron-LM builds."""

from argparse import Namespace
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

from megatron_tst.config import UserError
from megatron_tst.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class RunTokenizer:
    """The properties of a tokenizer that a run uses.

    Attributes:
        name: path of the tokenizer's file, or its kind.
        sha256: digest that identifies the tokenizer.
        vocab_size: one more than the largest token id.
        eod: id of the end-of-document token; None if there is none.
        unique_identifiers: identifiers that megatron-core puts into the names of cached indices.
        token_bytes: number of bytes of text of each token id; None if unknown.
    """

    name: str
    sha256: str
    vocab_size: int
    eod: int | None
    unique_identifiers: Any
    token_bytes: list[int] | None = None


def find_tokenizer(args: Namespace) -> RunTokenizer:
    """Return the tokenizer that the arguments name.

    Raises:
        UserError: if the tokenizer is not given or cannot be read.
    """
    name = args.tokenizer_model
    if args.tokenizer_type in (None, "HuggingFaceTokenizer") and (name is None or Path(name).exists()):
        if name is None:
            raise UserError("--tokenizer-model None: must be given")
        own = load_tokenizer(name)
        return RunTokenizer(
            str(own.path.resolve()), own.sha256, own.vocab_size, own.eod, own.unique_identifiers, own.token_bytes()
        )
    kind = args.tokenizer_type or "HuggingFaceTokenizer"
    args.tokenizer_type = kind
    try:
        stock = build_tokenizer(args)
    except Exception as error:  # each kind of tokenizer raises its own exceptions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--tokenizer-type {kind}: cannot be built: {reason}") from error
    description = repr((kind, stock.vocab_size, _file_digests(args)))
    digest = sha256(description.encode()).hexdigest()
    identifiers = {"tokenizer": kind, "sha256": digest}
    return RunTokenizer(kind, digest, stock.vocab_size, _end_of_document(stock), identifiers)


def _file_digests(args: Namespace) -> list[str]:
    paths = [Path(name) for name in (args.tokenizer_model, args.vocab_file, args.merge_file) if name]
    return [sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]


def _end_of_document(tokenizer: Any) -> int | None:
    try:
        return int(tokenizer.eod)
    except (AttributeError, NotImplementedError, TypeError):
        return None
