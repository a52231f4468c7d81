"""GPTModel that reads and predicts bags of tokens.

Shape letters: B sequences, L positions, S bag size, D hidden, Vp local vocabulary.
"""

from typing import Any

from megatron.core.models.gpt import GPTModel
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


class TSTGPTModel(GPTModel):  # type: ignore[misc]
    """megatron-core's GPTModel with a bag axis at both ends.

    ``forward`` takes ``input_ids`` as tokens ``[B, L]`` or bags ``[B, L, S]`` and ``labels`` as ``[B, L]`` or
    ``[B, L, S]``, and returns row losses ``[B, L]`` in nats, the sum over a row's valid targets weighted by the bag
    weights. A label of -100 carries neither loss nor gradient. With tokens and labels ``[B, L]`` this is GPTModel,
    loss for loss; parameters and checkpoint keys are GPTModel's at any bag size.

    Args:
        vocab_size: columns of embedding and head, padding included.
        real_vocab_size: columns that stand for tokens; the rest are never predicted. ``vocab_size`` where not given.
        loss: which loss to compute from labels.
        kwargs: GPTModel's own.
    """

    def __init__(
        self,
        *args: Any,
        vocab_size: int,
        real_vocab_size: int | None = None,
        loss: LossChoice | None = None,
        **kwargs: Any,
    ) -> None:
        """Build GPTModel, then let its word embedding take bags."""
        super().__init__(*args, vocab_size=vocab_size, **kwargs)
        self.real_vocab_size = vocab_size if real_vocab_size is None else real_vocab_size
        self.loss = loss or LossChoice()
        if self.pre_process:
            self.embedding.word_embeddings = self._bag_embedding()
        if self.post_process and self.loss.implementation == "linear":
            self.output_layer.__class__ = LinearLossOutputLayer

    def _bag_embedding(self) -> VocabParallelBagEmbedding:
        """Wrap the existing weight: drawing a new one would move the random stream away from GPTModel's."""
        stock = self.embedding.word_embeddings
        embedding = VocabParallelBagEmbedding(
            stock.num_embeddings,
            stock.embedding_dim,
            init_method=lambda weight: weight,
            reduce_scatter_embeddings=stock.reduce_scatter_embeddings,
            config=self.config,
            tp_group=stock.tp_group,
        )
        embedding.weight = stock.weight
        return embedding

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return row losses where there are labels, else logits ``[B, L, V]``, or what the next stage takes."""
        if self.post_process and self.loss.implementation == "linear":
            self.output_layer.hands_on = labels is not None
        return super().forward(*args, labels=labels, **kwargs)  # type: ignore[no-any-return]

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return row losses ``[B, L]`` float32 of labels ``[B, L]`` or ``[B, L, S]`` and logits ``[L, B, Vp]``.

        With the ``linear`` loss the output layer's input takes the place of logits. Collective: every rank of the
        tensor-parallel group calls it.
        """
        targets_BLS = labels.unsqueeze(-1) if labels.dim() == 2 else labels
        weights_S = bag_weights(self.loss.bag_weights, targets_BLS.shape[-1], device=logits.device)
        if self.loss.implementation == "linear":
            return self._linear_loss(logits, targets_BLS, weights_S)
        logits = mask_vocabulary_padding(logits, self.real_vocab_size, self.tp_group.rank())
        row_loss, _ = vocab_parallel_multi_hot_cross_entropy(
            logits, targets_BLS, weights_S, self.tp_group, self.loss.implementation, objective=self.loss.objective
        )
        return row_loss

    def _linear_loss(self, hidden: Tensor, targets_BLS: Tensor, weights_S: Tensor) -> Tensor:
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
