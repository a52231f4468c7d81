"""What a table of names is made of: rows, each with one transformation and its inverse.

Shape letters: G key-value heads, Q query heads per key-value head, E head width, D hidden, F inner width of a
feed-forward network, V vocabulary, Vp the same with padding.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_tst.shape import ModelShape


@dataclass(frozen=True)
class Transformation:
    """Turns one weight of megatron-core into one or more of Hugging Face's, and back.

    Attributes:
        split: megatron-core's weight to Hugging Face's, in the order of the row's names.
        join: its inverse.
    """

    split: Callable[[Tensor, ModelShape], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], ModelShape], Tensor]


def _split_query_key_value(weight: Tensor, shape: ModelShape) -> Sequence[Tensor]:
    """``[G (Q + 2) E, D]`` to ``[G Q E, D]``, ``[G E, D]``, ``[G E, D]``."""
    per_group = shape.num_attention_heads // shape.num_query_groups
    grouped = weight.view(shape.num_query_groups, per_group + 2, shape.kv_channels, shape.hidden_size)
    return [heads.flatten(0, 2) for heads in torch.split(grouped, [per_group, 1, 1], dim=1)]


def _join_query_key_value(weights: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """The inverse: each key-value head's queries, then its key and its value."""
    grouped = [heads.view(shape.num_query_groups, -1, shape.kv_channels, shape.hidden_size) for heads in weights]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def _pad_vocabulary(weights: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """``[V, D]`` to ``[Vp, D]`` with rows of zeros."""
    return torch.nn.functional.pad(weights[0], (0, 0, 0, shape.padded_vocab_size - shape.vocab_size))


SAME = Transformation(split=lambda weight, _: [weight], join=lambda weights, _: weights[0])
VOCABULARY = Transformation(split=lambda weight, shape: [weight[: shape.vocab_size]], join=_pad_vocabulary)
QUERY_KEY_VALUE = Transformation(split=_split_query_key_value, join=_join_query_key_value)
GATE_UP = Transformation(split=lambda weight, _: weight.chunk(2), join=lambda weights, _: torch.cat(list(weights)))


@dataclass(frozen=True)
class Row:
    """One weight under its two names.

    Attributes:
        megatron: key in a checkpoint, where all layers (and experts) are stacked on leading axes.
        hugging_face: names of the weights it becomes, one set per ``{layer}`` and ``{expert}``.
        size: of one layer's (one expert's) weight in the checkpoint, in attributes of :class:`ModelShape`.
        transformation: between the two.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    size: tuple[str, ...]
    transformation: Transformation = SAME

    def stacked(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the lengths of the leading axes: of layers, and of experts."""
        axes = {"{layer}": shape.num_layers, "{expert}": shape.num_experts}
        return tuple(length for axis, length in axes.items() if axis in self.hugging_face[0])

    def megatron_size(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the size of one layer's (one expert's) weight in the checkpoint."""
        return tuple(getattr(shape, name) for name in self.size)

    def hugging_face_sizes(self, shape: ModelShape) -> list[tuple[int, ...]]:
        """Return the sizes of the weights it becomes."""
        weight = torch.empty(self.megatron_size(shape), device="meta")
        return [tuple(part.shape) for part in self.transformation.split(weight, shape)]

    def names(self, index: tuple[int, ...]) -> list[str]:
        """Return the Hugging Face names of the weight at ``index`` on the leading axes."""
        places = dict(zip(("layer", "expert"), index, strict=False))
        return [name.format(**places) for name in self.hugging_face]


@dataclass(frozen=True)
class Architecture:
    """One of Hugging Face's model classes, as a table.

    Attributes:
        name: the class.
        model_type: its name in config.json.
        rows: all weights, in the order in which they are written.
        qk_layernorm: whether queries and keys are normalised.
        experts: whether feed-forward networks are mixtures of experts.
        settings: our setting to its key in config.json, beyond those that all architectures share.
        always: keys of config.json with the only value that megatron-core's model computes; they may be left out.
        stated: the same, where leaving the key out would mean another value.
        inert: keys of config.json to write, whose value does not matter where they are read.
        absent: what transformers takes where a key is left out, if the architectures differ in it.
    """

    name: str
    model_type: str
    rows: tuple[Row, ...]
    qk_layernorm: bool
    experts: bool
    settings: Mapping[str, str] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    stated: Mapping[str, Any] = field(default_factory=dict)
    inert: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)

    def rows_of(self, tied: bool) -> list[Row]:
        """Return the rows of a model whose head is, or is not, its embedding."""
        return [row for row in self.rows if not (tied and row.megatron == HEAD)]


EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"


def pieces(rows: Sequence[Row], shape: ModelShape) -> Iterator[tuple[Row, tuple[int, ...]]]:
    """Walk through a model layer by layer: each row, and the index of one weight on its leading axes."""
    for layered, group in itertools.groupby(rows, lambda row: bool(row.stacked(shape))):
        neighbours = list(group)
        for layer in range(shape.num_layers) if layered else [None]:
            for row in neighbours:
                lengths = row.stacked(shape)
                inner = itertools.product(*map(range, lengths[1:]))
                yield from ((row, () if layer is None else (layer, *rest)) for rest in inner)
