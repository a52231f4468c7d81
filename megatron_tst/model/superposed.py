"""Makes any megatron-core language model read and predict bags of tokens.

Shape letters: B sequences, L positions, S bag size, Vp local vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_tst.model.embedding import VocabParallelBagEmbedding
from megatron_tst.model.linear_loss import vocab_parallel_linear_multi_hot_cross_entropy
from megatron_tst.model.loss import (
    LossChoice,
    mask_vocabulary_padding,
    real_columns,
    vocab_parallel_multi_hot_cross_entropy,
)
from megatron_tst.model.output_layer import LinearLossOutputLayer
from megatron_tst.superposition import bag_weights


class Superposed:
    """Mixin that gives a ``LanguageModule`` such as GPTModel a bag axis; it precedes that class among the bases.

    ``forward`` then takes ``input_ids`` as tokens ``[B, L]`` or bags ``[B, L, S]`` and ``labels`` as ``[B, L]`` or
    ``[B, L, S]``, and returns row losses ``[B, L]``. Parameters, their names and their initial values do not change.

    Attributes:
        real_vocab_size: number of columns that stand for tokens; the columns after them are never predicted.
        loss: loss to compute from labels.
    """

    real_vocab_size: int
    loss: LossChoice

    def superpose(self: Any, real_vocab_size: int, loss: LossChoice) -> None:
        """Set the loss, and let the word embedding of this pipeline stage, if it has one, take bags.

        Only the classes of the modules change. The new classes add no state, and the weights keep the attributes that
        megatron-core has set on them.
        """
        self.real_vocab_size, self.loss = real_vocab_size, loss
        if self.pre_process:
            self.embedding.word_embeddings.__class__ = VocabParallelBagEmbedding
        if self.post_process and self.loss.implementation == "linear":
            self.output_layer.__class__ = LinearLossOutputLayer

    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return row losses if labels are given, else logits ``[B, L, V]``; earlier stages return hidden states."""
        if self.post_process and self.loss.implementation == "linear":
            self.output_layer.hands_on = labels is not None
        output: Tensor = super().forward(*args, labels=labels, **kwargs)  # type: ignore[misc]
        return output

    def compute_language_model_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
        """Return row losses ``[B, L]`` float32 of labels ``[B, L]`` or ``[B, L, S]`` and logits ``[L, B, Vp]``.

        With the ``linear`` loss, ``logits`` are the output layer's input instead. Collective: every rank of the
        tensor-parallel group calls it.
        """
        targets_BLS = labels.unsqueeze(-1) if labels.dim() == 2 else labels
        weights_S = bag_weights(self.loss.bag_weights, targets_BLS.shape[-1], device=logits.device)
        if self.loss.implementation == "linear":
            linear_loss: Tensor = self._linear_loss(logits, targets_BLS, weights_S)
            return linear_loss
        logits = mask_vocabulary_padding(logits, self.real_vocab_size, self.tp_group.rank())
        row_loss, _ = vocab_parallel_multi_hot_cross_entropy(
            logits, targets_BLS, weights_S, self.tp_group, self.loss.implementation, objective=self.loss.objective
        )
        return row_loss

    def _linear_loss(self: Any, hidden: Tensor, targets_BLS: Tensor, weights_S: Tensor) -> Tensor:
        is_tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if is_tied else self.output_layer.weight
        row_loss, _ = vocab_parallel_linear_multi_hot_cross_entropy(
            hidden,
            weight,
            targets_BLS,
            weights_S,
            self.tp_group,
            objective=self.loss.objective,
            num_real=real_columns(len(weight), self.real_vocab_size, self.tp_group.rank()),
            sequence_parallel=self.config.sequence_parallel,
            fuse_gradient=self.config.gradient_accumulation_fusion,
        )
        return row_loss


def superpose_model(chunk: torch.nn.Module, real_vocab_size: int, loss: LossChoice) -> None:
    """Give a built model the bag axis, in place.

    Args:
        chunk: ``LanguageModule`` of megatron-core without wrappers, such as GPTModel or HybridModel.
        real_vocab_size: number of columns that stand for tokens.
        loss: loss to compute from labels.
    """
    stock = type(chunk)
    chunk.__class__ = type(f"Superposed{stock.__name__}", (Superposed, stock), {})
    chunk.superpose(real_vocab_size, loss)  # type: ignore[operator]
