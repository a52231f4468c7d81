"""The parts of a table of names: rows, each with one transformation and its inverse.

Shape letters: G key-value heads, Q query heads per key-value head, E head width, D hidden, F inner width of a
feed-forward network, V vocabulary, Vp padded vocabulary.
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
    """Turns one weight of megatron-core into one or more weights of Hugging Face, and back.

    Attributes:
        split: turns megatron-core's weight into Hugging Face's weights, in the order of the row's names.
        join: inverse of ``split``.
    """

    split: Callable[[Tensor, ModelShape], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], ModelShape], Tensor]


def _split_query_key_value(weight: Tensor, shape: ModelShape) -> Sequence[Tensor]:
    """Split ``[G (Q + 2) E, D]`` into ``[G Q E, D]``, ``[G E, D]`` and ``[G E, D]``."""
    per_group = shape.num_attention_heads // shape.num_query_groups
    grouped = weight.view(shape.num_query_groups, per_group + 2, shape.kv_channels, shape.hidden_size)
    return [heads.flatten(0, 2) for heads in torch.split(grouped, [per_group, 1, 1], dim=1)]


def _join_query_key_value(weights: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """Join the three weights: for each key-value head its queries, then its key and its value."""
    grouped = [heads.view(shape.num_query_groups, -1, shape.kv_channels, shape.hidden_size) for heads in weights]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def _pad_vocabulary(weights: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """Pad ``[V, D]`` to ``[Vp, D]`` with rows of zeros."""
    return torch.nn.functional.pad(weights[0], (0, 0, 0, shape.padded_vocab_size - shape.vocab_size))


SAME = Transformation(split=lambda weight, _: [weight], join=lambda weights, _: weights[0])
VOCABULARY = Transformation(split=lambda weight, shape: [weight[: shape.vocab_size]], join=_pad_vocabulary)
QUERY_KEY_VALUE = Transformation(split=_split_query_key_value, join=_join_query_key_value)
GATE_UP = Transformation(split=lambda weight, _: weight.chunk(2), join=lambda weights, _: torch.cat(list(weights)))


@dataclass(frozen=True)
class Row:
    """One weight with its names in both formats.

    Attributes:
        megatron: key in a checkpoint, which stacks all layers (and experts) on leading axes.
        hugging_face: names of the corresponding weights, one set per ``{layer}`` and ``{expert}``.
        size: size of one layer's (one expert's) weight in the checkpoint, as attributes of :class:`ModelShape`.
        transformation: transformation between the two formats.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    size: tuple[str, ...]
    transformation: Transformation = SAME

    def stacked(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the lengths of the leading axes: the layers, then the experts."""
        axes = {"{layer}": shape.num_layers, "{expert}": shape.num_experts}
        return tuple(length for axis, length in axes.items() if axis in self.hugging_face[0])

    def megatron_size(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the size of one layer's (one expert's) weight in the checkpoint."""
        return tuple(getattr(shape, name) for name in self.size)

    def hugging_face_sizes(self, shape: ModelShape) -> list[tuple[int, ...]]:
        """Return the sizes of the corresponding Hugging Face weights."""
        weight = torch.empty(self.megatron_size(shape), device="meta")
        return [tuple(part.shape) for part in self.transformation.split(weight, shape)]

    def names(self, index: tuple[int, ...]) -> list[str]:
        """Return the Hugging Face names of the weight at ``index`` on the leading axes."""
        places = dict(zip(("layer", "expert"), index, strict=False))
        return [name.format(**places) for name in self.hugging_face]


@dataclass(frozen=True)
class Architecture:
    """The table of one of Hugging Face's model classes.

    Attributes:
        name: name of the class.
        model_type: name of the architecture in config.json.
        rows: all weights, in the order in which they are written.
        qk_layernorm: whether queries and keys are normalized.
        experts: whether the model is an MoE.
        settings: key in config.json of each setting, beyond those that all architectures share.
        always: keys of config.json with their only supported value, which is also their default.
        stated: keys of config.json with their only supported value, which differs from their default.
        inert: keys of config.json that are written, but whose values do not matter when they are read.
        absent: defaults of transformers for missing keys that differ between the architectures.
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
        """Return the rows of a model with tied or untied embedding and output layer."""
        return [row for row in self.rows if not (tied and row.megatron == HEAD)]


EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"


def pieces(rows: Sequence[Row], shape: ModelShape) -> Iterator[tuple[Row, tuple[int, ...]]]:
    """Iterate over a model layer by layer, yielding each row with the index of a weight on its leading axes."""
    for layered, group in itertools.groupby(rows, lambda row: bool(row.stacked(shape))):
        neighbours = list(group)
        for layer in range(shape.num_layers) if layered else [None]:
            for row in neighbours:
                lengths = row.stacked(shape)
                inner = itertools.product(*map(range, lengths[1:]))
                yield from ((row, () if layer is None else (layer, *rest)) for rest in inner)
