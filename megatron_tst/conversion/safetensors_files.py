"""Writes and reads safetensors shards one weight at a time.

A file consists of the header's length (8 bytes, little endian), the header (JSON: name to dtype, shape and offsets)
and the bytes of the weights. The safetensors library writes a file from a dictionary of all its weights; this module
releases each weight after writing it.
"""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tst.config import UserError

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Weight:
    """Name, shape and type of a weight.

    Attributes:
        name: name in the file.
        size: shape of the weight.
        dtype: floating-point type of the weight.
    """

    name: str
    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Number of bytes in the file."""
        return prod(self.size) * self.dtype.itemsize


def write_shards(
    folder: Path,
    weights: Sequence[Weight],
    tensors: Iterable[Tensor],
    max_shard_bytes: int,
    on_progress: Callable[[int], object],
) -> None:
    """Write weights into as few files as their order allows, with an index if there are several files.

    Args:
        folder: existing folder to write to.
        weights: names, shapes and types of the weights, in order.
        tensors: values of the weights, in the same order; each is released after it was written.
        max_shard_bytes: largest number of weight bytes in a file; a larger weight has a file of its own.
        on_progress: called with the number of bytes of each weight.
    """
    shards = _shards(weights, max_shard_bytes)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    coming = iter(tensors)
    for name, shard in zip(names if len(shards) > 1 else [ONE_FILE], shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for weight in shard:
                # No variable keeps a reference to a weight while the next one is read.
                file.write(_content(weight, next(coming)))
                on_progress(weight.num_bytes)
    if len(shards) > 1:
        where = {weight.name: name for name, shard in zip(names, shards, strict=True) for weight in shard}
        total = sum(weight.num_bytes for weight in weights)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(weights: Sequence[Weight], max_shard_bytes: int) -> list[list[Weight]]:
    shards: list[list[Weight]] = [[]]
    filled = 0
    for weight in weights:
        if shards[-1] and filled + weight.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += weight.num_bytes
    return shards


def _content(weight: Weight, tensor: Tensor) -> memoryview:
    assert (tuple(tensor.shape), tensor.dtype) == (weight.size, weight.dtype), weight.name
    # The view as bytes is needed because numpy has no bfloat16.
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(shard: Sequence[Weight]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for weight in shard:
        end = start + weight.num_bytes
        entries[weight.name] = {
            "dtype": _CODES[weight.dtype],
            "shape": list(weight.size),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # weights start at a multiple of 8
    return struct.pack("<Q", len(text)) + text


class SafetensorsFolder:
    """The weights of a Hugging Face folder, read by name.

    Attributes:
        weights: shape and type of each weight, by name.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files; the library refuses a file whose header and length disagree.

        Args:
            folder: folder with ``model.safetensors``, or with shards and their index.

        Raises:
            UserError: if a file is missing or malformed, the index and the files disagree, or the
                safetensors package is not installed.
        """
        self._stored: dict[str, tuple[Path, str]] = {}  # file of each weight, and its name in that file
        self.weights: dict[str, Weight] = {}
        index = folder / INDEX
        places = _read_index(index) if index.exists() else None
        for name in [ONE_FILE] if places is None else sorted(set(places.values())):
            self._add(_existing(folder, name), places)
        for name, file in (places or {}).items():
            if name not in self._stored:
                raise UserError(f"{folder / file}: does not hold {name}, although {INDEX} says so")

    def _add(self, path: Path, places: dict[str, str] | None) -> None:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 - the library's object is no mapping
                found = file.get_slice(name)
                code = found.get_dtype()
                if code not in DTYPES:
                    raise UserError(f"{path}: {name}: type {code} cannot be converted, only {', '.join(DTYPES)}")
                if places is not None and places.get(name) != path.name:
                    raise UserError(f"{path}: holds {name}, but {INDEX} names {places.get(name, 'no file')} for it")
                self.weights[name] = Weight(name, tuple(found.get_shape()), DTYPES[code])
                self._stored[name] = path, name

    def read(self, name: str) -> Tensor:
        """Read one weight."""
        path, stored_name = self._stored[name]
        with _open(path) as file:
            tensor = file.get_tensor(stored_name)
        assert isinstance(tensor, Tensor)
        return tensor

    def rename(self, name: str, other: str) -> None:
        """Rename a weight; the file does not change."""
        weight = self.weights.pop(name)
        self.weights[other] = replace(weight, name=other)
        self._stored[other] = self._stored.pop(name)


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each weight."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        wrong = next(((name, file) for name, file in places.items() if not isinstance(file, str)), None)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as an index of weights: {error!r}") from error
    if wrong:
        raise UserError(f"{path}: {wrong[0]}: {wrong[1]!r} is not the name of a file")
    return dict(places)


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file() and Path(name).name == name:
        return path
    if name != ONE_FILE:
        raise UserError(f"{path}: is missing, but {INDEX} names it")
    pickled = next((path.name for path in sorted(folder.glob("pytorch_model*.bin"))), None)
    if pickled:
        raise UserError(
            f"{folder}: holds pickled weights ({pickled}), which can run code when read; only safetensors are "
            "supported: load it with transformers and save it again with save_pretrained"
        )
    raise UserError(f"{folder}: is not a Hugging Face folder with safetensors: {ONE_FILE} is missing")


def _open(path: Path) -> Any:
    try:
        import safetensors
    except ImportError:
        raise UserError("reading Hugging Face weights needs the package safetensors: pip install safetensors") from None
    try:
        return safetensors.safe_open(path, framework="pt")
    except Exception as error:  # the library raises its own class for a malformed header, OSError for a missing file
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from error
