"""Compares the logits of both sides of a conversion on the same text."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from megatron_tst.config import UserError
from megatron_tst.conversion.casting import Casting
from megatron_tst.megatron_patches.safe_checkpoint import safe_loading

# The largest difference of two logits, relative to the largest logit, that rounding explains: rounding of float32
# arithmetic for equal weights, or rounding of the weights themselves to a shorter type.
EXACT = 1e-4
ROUNDED = {torch.float32: EXACT, torch.float16: 0.02, torch.bfloat16: 0.1}


def tolerance_for(casting: Casting) -> float:
    """Return the largest difference, relative to the largest logit, that rounding explains after the casting."""
    return ROUNDED[casting.dtype] if casting.rounded and casting.dtype else EXACT


class DifferentLogitsError(UserError):
    """The two sides of a conversion compute different things."""

    exit_code = 1


@dataclass(frozen=True)
class Difference:
    """The difference between two models' logits.

    Attributes:
        positions: number of positions of the text.
        largest: largest absolute difference of two logits.
        largest_logit: largest absolute value of a logit, for scale.
        same_choice: number of positions at which both models predict the same most likely next token.
    """

    positions: int
    largest: float
    largest_logit: float
    same_choice: int

    def __str__(self) -> str:
        """Describe the difference in one line."""
        return (
            f"largest logit difference {self.largest:.2g} (largest logit {self.largest_logit:.3g}), "
            f"same most likely token at {self.same_choice} of {self.positions} positions"
        )

    def check(self, tolerance: float) -> None:
        """Compare the difference with a tolerance.

        Args:
            tolerance: largest allowed difference, relative to the largest logit.

        Raises:
            DifferentLogitsError: if the difference is larger, or a logit is NaN or infinite.
        """
        if not (math.isfinite(self.largest) and self.largest <= tolerance * self.largest_logit):
            limit = f"{tolerance:.2g} (--verify-tolerance) of the largest logit"
            raise DifferentLogitsError(f"--verify: {self}: the difference exceeds {limit}")


def load_weights(model: GPTModel, folder: Path) -> None:
    """Load a checkpoint's weights with megatron-core's own reader, which is independent of the conversion.

    Args:
        model: a GPTModel on a single rank, without wrappers; its type does not change.
        folder: folder of the checkpoint, ``iter_0000123``.
    """
    with safe_loading():
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)
    model.load_state_dict(loaded["model"])


@torch.no_grad()
def compare_logits(model: torch.nn.Module, hugging_face: Path, tokens: list[int]) -> Difference:
    """Run our model and transformers' model in float32 on the same tokens.

    Args:
        model: a float32 GPTModel with its weights loaded.
        hugging_face: the Hugging Face folder.
        tokens: token ids of the text.

    Raises:
        UserError: if transformers is not installed.
    """
    theirs = _load_hugging_face(hugging_face)
    tokens_BL = torch.tensor([tokens], device=next(model.parameters()).device)
    places_BL = torch.arange(len(tokens), device=tokens_BL.device).unsqueeze(0)
    their_logits_LV = theirs(tokens_BL.cpu()).logits[0]
    our_logits_LV = model.eval()(tokens_BL, places_BL, None)[0, :, : their_logits_LV.shape[1]].cpu()
    return Difference(
        positions=len(tokens),
        largest=float((our_logits_LV - their_logits_LV).abs().max()),
        largest_logit=float(our_logits_LV.abs().max()),
        same_choice=int((our_logits_LV.argmax(-1) == their_logits_LV.argmax(-1)).sum()),
    )


def _load_hugging_face(folder: Path) -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("--verify: needs the package transformers: pip install transformers") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
