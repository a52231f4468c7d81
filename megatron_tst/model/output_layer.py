"""The output layer of a model whose loss multiplies by the weight itself."""

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor


class LinearLossOutputLayer(ColumnParallelLinear):  # type: ignore[misc]
    """megatron-core's output layer, which hands its input on where a loss is computed from it.

    GPTModel calls it before ``compute_language_model_loss`` whatever the loss is, so the hooks that gather parameters
    and reduce gradients run as ever, and no method of GPTModel beside these two is involved.

    It adds no state: an output layer becomes one by its class, and its weight and checkpoint keys stay as they are.

    Attributes:
        hands_on: whether ``forward`` returns the hidden states in place of logits.
    """

    hands_on = False

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits, or the hidden states as they came, and no bias."""
        if self.hands_on:
            return input_, None
        return super().forward(input_, weight, runtime_gather_output)  # type: ignore[no-any-return]
