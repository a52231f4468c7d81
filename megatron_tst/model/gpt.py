"""GPTModel that reads and predicts bags of tokens.

Shape letters: B sequences, L positions, S bag size.
"""

from typing import Any

from megatron.core.models.gpt import GPTModel

from megatron_tst.model.loss import LossChoice
from megatron_tst.model.superposed import Superposed


class TSTGPTModel(Superposed, GPTModel):  # type: ignore[misc]
    """megatron-core's GPTModel with a bag axis in its inputs and labels.

    ``forward`` takes ``input_ids`` as tokens ``[B, L]`` or bags ``[B, L, S]`` and ``labels`` as ``[B, L]`` or
    ``[B, L, S]``, and returns row losses ``[B, L]`` in nats, the sum over a row's valid targets weighted by the bag
    weights. A label of -100 carries neither loss nor gradient. With tokens and labels ``[B, L]`` the losses equal
    GPTModel's; parameters and checkpoint keys are GPTModel's at any bag size.

    Args:
        vocab_size: number of rows of embedding and output layer, padding included.
        real_vocab_size: number of tokens; the rows after them are never predicted. The default is ``vocab_size``.
        loss: loss to compute from labels.
        kwargs: further arguments of GPTModel.
    """

    def __init__(
        self,
        *args: Any,
        vocab_size: int,
        real_vocab_size: int | None = None,
        loss: LossChoice | None = None,
        **kwargs: Any,
    ) -> None:
        """Build GPTModel, then give it the bag axis."""
        super().__init__(*args, vocab_size=vocab_size, **kwargs)
        self.superpose(vocab_size if real_vocab_size is None else real_vocab_size, loss or LossChoice())
