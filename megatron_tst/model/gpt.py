"""GPTModel that reads and predicts bags of tokens.

Shape letters: B sequences, L positions, S bag size, D hidden, Vp local vocabulary.
"""

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_tst.model.embedding import VocabParallelBagEmbedding
from megatron_tst.model.loss import LossChoice, mask_vocabulary_padding, vocab_parallel_multi_hot_cross_entropy
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

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return row losses ``[B, L]`` float32 of labels ``[B, L]`` or ``[B, L, S]`` and logits ``[L, B, Vp]``.

        Collective: every rank of the tensor-parallel group calls it.
        """
        targets_BLS = labels.unsqueeze(-1) if labels.dim() == 2 else labels
        weights_S = bag_weights(self.loss.bag_weights, targets_BLS.shape[-1], device=logits.device)
        logits = mask_vocabulary_padding(logits, self.real_vocab_size, self.tp_group.rank())
        row_loss, _ = vocab_parallel_multi_hot_cross_entropy(
            logits, targets_BLS, weights_S, self.tp_group, self.loss.implementation, objective=self.loss.objective
        )
        return row_loss
