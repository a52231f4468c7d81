#!/usr/bin/env python3
r"""Encode text into megatron-core's .bin/.idx files.

    python tools/preprocess_data.py --input corpus/ --output-prefix data/corpus \
        --tokenizer-model data/tokenizer.json --tst-train-bpe 4096 --append-eod --workers 2

Inputs are text files (one document each) and JSON lines (one document per line), optionally compressed with gzip or
zstandard, and folders of such files. The output is OUTPUT_PREFIX_text_document.bin and .idx, as with Megatron-LM's tool
of the same name.
"""

import argparse
import contextlib
import random
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_tst.config import EXIT_CODE, UserError
from megatron_tst.config.locks import locked
from megatron_tst.data.documents import Skipped, list_inputs, read_documents
from megatron_tst.data.interruption import InterruptedBySignal, raise_on_signals
from megatron_tst.data.preprocess import Written, learn_tokenizer, write_indexed
from megatron_tst.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer


def parse_arguments() -> argparse.Namespace:
    """Read the command line; flags shared with Megatron-LM's tool have the same names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, help="files and folders")
    parser.add_argument("--output-prefix", required=True, help="path without suffix")
    parser.add_argument("--tokenizer-model", required=True, help="path of tokenizer.json, which --tst-train-bpe writes")
    parser.add_argument(
        "--tst-train-bpe", type=int, metavar="VOCAB", help="first learn a byte-level BPE of this size from the input"
    )
    parser.add_argument("--json-keys", default="text", help="key of the text in each JSON line")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--workers", type=int, default=1, help="number of encoding processes")
    parser.add_argument("--tst-suffixes", nargs="*", default=[], help="suffixes of files to read in folders: .py .txt")
    parser.add_argument("--tst-exclude", nargs="*", default=[], help="names of folders to skip: site-packages")
    parser.add_argument("--tst-shuffle-files", type=int, metavar="SEED", help="read the files in a random order")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    """Learn the tokenizer if asked to, then encode."""
    if sys.getfilesystemencoding() != "utf-8":
        raise UserError(
            f"LC_ALL: the locale's encoding is {sys.getfilesystemencoding()}, but must be UTF-8: set PYTHONUTF8=1"
        )
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: must be at least 1")
    if not arguments.output_prefix:
        raise UserError("--output-prefix : must name a path without suffix")
    files = list_inputs(arguments.input, tuple(arguments.tst_suffixes), frozenset(arguments.tst_exclude))
    if arguments.tst_shuffle_files is not None:
        random.Random(arguments.tst_shuffle_files).shuffle(files)  # noqa: S311
    prefix = Path(f"{arguments.output_prefix}_{arguments.json_keys}_document")
    with contextlib.ExitStack() as outputs:
        outputs.enter_context(locked(prefix, f"--output-prefix {arguments.output_prefix}"))
        if arguments.tst_train_bpe is not None:
            path = Path(arguments.tokenizer_model)
            if path.is_dir():
                raise UserError(f"--tokenizer-model {path}: is a folder; with --tst-train-bpe, name the file to write")
            outputs.enter_context(locked(path, f"--tokenizer-model {path}"))
        _encode(arguments, files, prefix)


def _encode(arguments: argparse.Namespace, files: list[Path], prefix: Path) -> None:
    tokenizer = _tokenizer(arguments, files)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("encoding", total=sum(file.stat().st_size for file in files))
        skipped = Skipped()
        written = write_indexed(
            read_documents(files, arguments.json_keys, skipped),
            tokenizer,
            prefix,
            append_eod=arguments.append_eod,
            workers=arguments.workers,
            on_progress=lambda num_bytes: progress.advance(task, num_bytes),
        )
    _report(written, tokenizer, skipped)


def _tokenizer(arguments: argparse.Namespace, files: list[Path]) -> Tokenizer:
    if arguments.tst_train_bpe is None:
        return load_tokenizer(arguments.tokenizer_model)
    print(f"learning a byte-level BPE of {arguments.tst_train_bpe} tokens", flush=True)
    content = learn_tokenizer(files, arguments.json_keys, arguments.tst_train_bpe)
    return save_tokenizer(content, Path(arguments.tokenizer_model))


def _report(written: Written, tokenizer: Tokenizer, skipped: Skipped) -> None:
    print(
        f"{written.prefix}.bin/.idx: {written.num_documents:,} documents, {written.num_tokens:,} data tokens, "
        f"vocabulary {tokenizer.vocab_size}"
    )
    if skipped.total:
        print(skipped.describe())


if __name__ == "__main__":
    try:
        with raise_on_signals():
            main(parse_arguments())
    except InterruptedBySignal as stop:
        print(f"preprocess_data.py: stopped by {stop.name}: no corpus was written", file=sys.stderr)
        sys.exit(stop.exit_code)
    except UserError as error:
        print(f"preprocess_data.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
