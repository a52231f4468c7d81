"""The output layer of a model whose loss does the multiplication by the weight itself."""

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor


class LinearLossOutputLayer(ColumnParallelLinear):  # type: ignore[misc]
    """megatron-core's output layer, which returns its input unchanged if the loss is computed from the hidden states.

    GPTModel calls it before ``compute_language_model_loss`` for every loss, so the hooks that gather parameters and
    reduce gradients run as usual, and no method of GPTModel besides ``forward`` and that one is involved.

    The class adds no state: an output layer is converted by assigning its ``__class__``, and its weight and checkpoint
    keys do not change.

    Attributes:
        hands_on: whether ``forward`` returns the hidden states in place of logits.
    """

    hands_on = False

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits, or the unchanged hidden states, and None in place of a bias."""
        if self.hands_on:
            return input_, None
        return super().forward(input_, weight, runtime_gather_output)  # type: ignore[no-any-return]
