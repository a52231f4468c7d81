#!/usr/bin/env python3
"""Convert a checkpoint to a Hugging Face folder, or back.

python tools/convert_ckpt.py --load RUN/checkpoints --save hf/
python tools/convert_ckpt.py --direction hf-to-megatron --load hf/ --save weights/

The first command converts a run of any parallel layout to a folder for AutoModelForCausalLM.from_pretrained; the second
converts a Hugging Face folder to a checkpoint for pretrain_tst.py --load weights/ --finetune.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_tst.checkpoint.checksums import CHECKSUMS
from megatron_tst.checkpoint.saved_checkpoint import SavedCheckpoint
from megatron_tst.config import UserError, require
from megatron_tst.conversion.saved_checkpoints import check_files, find_saved_checkpoint
from megatron_tst.conversion.settings import inexpressible
from megatron_tst.conversion.to_hugging_face import EndOfDocument, Export
from megatron_tst.conversion.to_megatron import Import
from megatron_tst.data.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SENTENCE = "The model reads bags of tokens first, and single tokens after that."


# torch's switch for huge pages, which torch reads at its first large allocation. Weights are in memory only briefly
# here; without huge pages, mapping their pages takes half of the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, required=True, help="RUN/checkpoints, or a Hugging Face folder")
    parser.add_argument("--save", type=Path, required=True, help="folder to write; it appears whole or not at all")
    parser.add_argument("--direction", choices=("megatron-to-hf", "hf-to-megatron"), default="megatron-to-hf")
    parser.add_argument("--iteration", type=int, help="iteration of the checkpoint; default: the latest")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the written weights; default: unchanged")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of tokenizer.json; default: the run's")
    parser.add_argument("--max-shard-size", default="5GB", help="largest size of a file of weights")
    parser.add_argument(
        "--force", action="store_true", help="replace an earlier conversion once the new one is complete"
    )
    parser.add_argument(
        "--no-verify-checkpoint", action="store_true", help="do not compare the checkpoint's files with their checksums"
    )
    parser.add_argument("--verify", action="store_true", help="load both models and compare their logits")
    parser.add_argument("--verify-text", type=Path, metavar="FILE", help="text to compare on; default: one sentence")
    parser.add_argument(
        "--verify-tolerance", type=float, metavar="FRACTION", help="largest difference, relative to the largest logit"
    )
    return parser.parse_args()


@dataclass(frozen=True)
class Conversion:
    """A conversion that is ready to run.

    Attributes:
        title: title of the progress bar.
        work: the weights and their casting.
        tokenizer: tokenizer of the model.
        write: runs the conversion; its argument is called with the number of bytes of each weight.
        sides: returns our checkpoint and the Hugging Face folder after the conversion.
        warnings: warnings about everything that the conversion cannot preserve.
    """

    title: str
    work: Export | Import
    tokenizer: Tokenizer
    write: Callable[[Callable[[int], object]], None]
    sides: Callable[[], tuple[SavedCheckpoint, Path]]
    warnings: list[str]


def main(arguments: argparse.Namespace) -> None:
    """Convert, then compare both sides if asked to."""
    text = _text(arguments.verify_text)
    tolerance = arguments.verify_tolerance
    if tolerance is not None and not tolerance > 0:
        raise UserError(f"--verify-tolerance {tolerance}: must be above 0")
    prepare = _to_hugging_face if arguments.direction == "megatron-to-hf" else _to_megatron
    conversion = prepare(arguments)
    tokens = conversion.tokenizer.encode_batch([text])[0]
    if not tokens:
        raise UserError(f"--verify-text {arguments.verify_text}: holds no token to compare on")
    with _progress(conversion.title, conversion.work.num_bytes) as advance:
        conversion.write(advance)
    print(f"wrote {arguments.save}", flush=True)
    for warning in (*conversion.warnings, *_not_finite(conversion.work.casting.not_finite)):
        print(f"convert_ckpt.py: warning: {warning}", file=sys.stderr)
    if arguments.verify or arguments.verify_text or tolerance is not None:
        _verify(*conversion.sides(), tokens, conversion.work, tolerance)


def _not_finite(names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{names[0]} holds NaN or infinity, as do {len(names) - 1} other weights; they are written unchanged"]


def _to_hugging_face(arguments: argparse.Namespace) -> Conversion:
    saved = find_saved_checkpoint(
        arguments.load, arguments.iteration, check=None if arguments.no_verify_checkpoint else _check_files
    )
    tokenizer = _tokenizer(arguments.tokenizer or saved.tokenizer, require("--vocab-size", saved.vocab_size))
    end = EndOfDocument(tokenizer.eod, tokenizer.decode([tokenizer.eod]))
    export = Export(saved, DTYPES.get(arguments.dtype))
    unchecked = f"{saved.folder}: was not written by megatron-tst and has no checksums, so it was converted unchecked"
    max_shard_bytes = _bytes(arguments.max_shard_size)
    return Conversion(
        title=f"{saved.folder.name} to Hugging Face",
        work=export,
        tokenizer=tokenizer,
        write=lambda advance: export.write(
            arguments.save, tokenizer.path, end, max_shard_bytes, arguments.force, on_progress=advance
        ),
        sides=lambda: (saved, arguments.save),
        warnings=[*([] if saved.has_checksums else [unchecked]), *inexpressible(saved.model)],
    )


def _to_megatron(arguments: argparse.Namespace) -> Conversion:
    if arguments.iteration is not None:
        raise UserError(f"--iteration {arguments.iteration}: a Hugging Face folder has no iterations")
    weights = Import(arguments.load, DTYPES.get(arguments.dtype))
    tokenizer = _tokenizer(arguments.tokenizer or arguments.load, weights.vocab_size)
    return Conversion(
        title="Hugging Face to checkpoint",
        work=weights,
        tokenizer=tokenizer,
        write=lambda advance: weights.write(arguments.save, tokenizer.path, arguments.force, on_progress=advance),
        sides=lambda: (find_saved_checkpoint(arguments.save, None), arguments.load),
        warnings=[],
    )


def _text(path: Path | None) -> str:
    try:
        return path.read_text(encoding="utf-8") if path else SENTENCE
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--verify-text {path}: cannot be read: {error}") from error


def _tokenizer(path: Path | None, vocab_size: int) -> Tokenizer:
    if path is None:
        raise UserError("--load: the checkpoint names no tokenizer: name the folder of its tokenizer with --tokenizer")
    if not (path / "tokenizer.json" if path.is_dir() else path).is_file():
        raise UserError(f"{path} holds no tokenizer.json: name the folder of the tokenizer with --tokenizer")
    tokenizer = load_tokenizer(str(path), flag="--tokenizer")
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"--tokenizer {path}: has {tokenizer.vocab_size} tokens, but the model has {vocab_size}")
    return tokenizer


def _bytes(size: str) -> int:
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", size.strip().upper())
    if not parts or parts[2] not in UNITS or not float(parts[1]):
        raise UserError(f"--max-shard-size {size}: must be a number of bytes such as 5GB or 500MB")
    return int(float(parts[1]) * UNITS[parts[2]])


def _check_files(folder: Path) -> None:
    num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.name != CHECKSUMS)
    with _progress(f"verifying {folder.name}", num_bytes) as advance:
        check_files(folder, advance)


@contextlib.contextmanager
def _progress(title: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=num_bytes)
        yield lambda done: progress.advance(task, done)


def _verify(
    saved: SavedCheckpoint, hugging_face: Path, tokens: list[int], work: Export | Import, tolerance: float | None
) -> None:
    from megatron_tst.config import ParallelSettings, TrainingSettings
    from megatron_tst.conversion.verify import compare_logits, load_weights, tolerance_for
    from megatron_tst.distributed import (
        ParallelSizes,
        destroy_parallel_state,
        enter_device,
        init_parallel_state,
        seed_everything,
    )
    from megatron_tst.megatron_patches import find_libraries
    from megatron_tst.model import LossChoice, build_gpt, transformer_config
    from megatron_tst.shape import resolve_shape

    model, libraries = saved.model, find_libraries()
    init_parallel_state(ParallelSizes())
    seed_everything(0)
    shape = resolve_shape(model, saved.vocab_size)
    config = transformer_config(model, shape, TrainingSettings(), ParallelSettings(), libraries)
    has_te = libraries.transformer_engine is not None
    gpt = build_gpt(config, model, shape, LossChoice(), use_transformer_engine=has_te)
    load_weights(gpt.to(enter_device().torch_device), saved.folder)
    found = compare_logits(gpt, hugging_face, tokens[: shape.max_position_embeddings])
    destroy_parallel_state()
    found.check(tolerance_for(work.casting) if tolerance is None else tolerance)
    print(found)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except UserError as error:
        print(f"convert_ckpt.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("convert_ckpt.py: interrupted; no partial output remains", file=sys.stderr)
        sys.exit(130)
