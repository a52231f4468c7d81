"""The output layer of a model whose loss multiplies by the weight itself."""

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor


class LinearLossOutputLayer(ColumnParallelLinear):  # type: ignore[misc]
    """megatron-core's output layer, which hands its input on where a loss is computed from it.

    GPTModel calls it before ``compute_language_model_loss`` whatever the loss is, so the hooks that gather parameters
    and reduce gradients run as ever, and no method of GPTModel beside these two is involved.

    Attributes:
        hands_on: whether ``forward`` returns the hidden states in place of logits.
    """

    hands_on = False

    @classmethod
    def around(cls, stock: ColumnParallelLinear) -> "LinearLossOutputLayer":
        """Wrap the existing weight: drawing a new one would move the random stream away from GPTModel's."""
        layer = cls(
            stock.input_size,
            stock.output_size,
            config=stock.config,
            init_method=lambda weight: weight,
            bias=False,
            gather_output=stock.gather_output,
            skip_weight_param_allocation=True,
            tp_group=stock.tp_group,
        )
        layer.weight = stock.weight
        return layer

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits, or the hidden states as they came, and no bias."""
        if self.hands_on:
            return input_, None
        return super().forward(input_, weight, runtime_gather_output)  # type: ignore[no-any-return]
