"""The multi-hot cross-entropy through one call of Transformer Engine's fused cross-entropy.

All targets of a row share the softmax, so their losses differ only by their logits. The kernel computes the loss of
one target, the anchor; the others follow as ``CE_i = CE_anchor + (z_anchor - z_i)``. The kernel's gradient is correct
everywhere except in the targets' columns, which are overwritten with ``g (omega exp(-CE_i) - c_i)``, computed in
float32.

This works with every kernel of Transformer Engine 2.9 to 2.20, whether it overwrites the logits in the forward pass
(to 2.17), in the backward pass (from 2.19 on) or not at all (2.18), since the target logits are read before the call.

Shape letters: L positions, B sequences, S bag size, Vp local vocabulary.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor

from megatron_tst.config import UserError
from megatron_tst.megatron_patches import find_libraries
from megatron_tst.model.target_columns import TargetColumns, gather_target_logits, write_target_columns
from megatron_tst.superposition import Objective, target_coefficients

OLDEST, NEWEST = Version("2.9"), Version("2.21")  # the first is included, the second is not


@dataclass(frozen=True)
class Kernel:
    """Transformer Engine's fused cross-entropy of any supported version, with one signature.

    Attributes:
        function: Transformer Engine's function.
        rounds_once: whether the gradient stays in float32 until it is rounded once, and the logits are overwritten only
            on request. Up to 2.17 the gradient is first stored in the logits' dtype, which loses it for a confident
            target.
    """

    function: Callable[..., Tensor]
    rounds_once: bool

    def __call__(self, logits: Tensor, targets: Tensor, ignore_index: int, group: dist.ProcessGroup) -> Tensor:
        """Return the loss ``[L, B]`` float32 of logits ``[L, B, Vp]`` and targets ``[L, B]``."""
        positional = (logits.contiguous(), targets.contiguous(), 0.0, False, group, ignore_index)
        if self.rounds_once:
            return self.function(*positional, overwrite_input=True)
        # Without is_cg_capturable, the last argument, the kernel asks the device whether the upstream gradient is one.
        return self.function(*positional, True)


@functools.cache
def load_kernel() -> Kernel:
    """Return Transformer Engine's fused cross-entropy with one signature for all versions.

    Raises:
        UserError: if Transformer Engine is missing or its version is not supported.
    """
    installed = find_libraries().transformer_engine
    if installed is None or not OLDEST <= Version(installed) < NEWEST:
        raise UserError(
            f"--cross-entropy-fusion-impl te: Transformer Engine is {installed or 'not usable'}; supported are "
            "2.9 to 2.20, or use --cross-entropy-fusion-impl native"
        )
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return adapt_kernel(parallel_cross_entropy)


def adapt_kernel(parallel_cross_entropy: Callable[..., Tensor]) -> Kernel:
    """Hide the differences between versions: keywords, CUDA graph capture and the overwriting of the logits."""
    # Version 2.9 is a bare autograd function, which has no signature and takes positional arguments only.
    parameters: Any = {}
    if inspect.isfunction(parallel_cross_entropy):
        parameters = inspect.signature(parallel_cross_entropy).parameters
    return Kernel(parallel_cross_entropy, rounds_once="overwrite_input" in parameters)


class TEMultiHotCrossEntropy(torch.autograd.Function):
    """Autograd function of the row losses with one kernel call, which may overwrite the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_LBVp: Tensor,
        targets_LBS: Tensor,
        weights_LBS: Tensor,
        objective: Objective,
        kernel: Kernel,
        ignore_index: int,
        tp_group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        """Return row losses and row weights, ``[L, B]`` float32."""
        is_valid = targets_LBS != ignore_index
        columns = TargetColumns.locate(targets_LBS, is_valid, logits_LBVp.shape[-1], tp_group.rank())
        target_logits = gather_target_logits(logits_LBVp, columns, tp_group)
        # The anchor is the first valid target; in a row without valid targets it is an ignored one.
        anchor = is_valid.int().argmax(dim=-1, keepdim=True)
        with torch.enable_grad():
            leaf = logits_LBVp.detach().requires_grad_()
            anchor_loss = kernel(leaf, targets_LBS.gather(-1, anchor).squeeze(-1), ignore_index, tp_group)
        # The logits are subtracted first, so that their common magnitude cancels before the sum is rounded.
        cross_entropy = anchor_loss.detach().unsqueeze(-1) + (target_logits.gather(-1, anchor) - target_logits)
        row_loss, row_weight, coefficients = objective(cross_entropy, targets_LBS, weights_LBS, is_valid)
        at_targets = row_weight.unsqueeze(-1) * torch.exp(-cross_entropy)
        at_targets = at_targets - target_coefficients(targets_LBS, coefficients)
        ctx.leaf, ctx.anchor_loss = leaf, anchor_loss
        ctx.save_for_backward(at_targets, row_weight, columns.index, columns.is_here)
        ctx.mark_non_differentiable(row_weight)
        return row_loss, row_weight

    @staticmethod
    def backward(ctx: Any, grad_LB: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Return the kernel's gradient with the targets' columns overwritten."""
        at_targets, row_weight, index, is_here = ctx.saved_tensors
        (gradient,) = torch.autograd.grad(ctx.anchor_loss, ctx.leaf, (grad_LB * row_weight).contiguous())
        ctx.leaf = ctx.anchor_loss = None
        write_target_columns(gradient, grad_LB.unsqueeze(-1) * at_targets, TargetColumns(index, is_here))
        return gradient, None, None, None, None, None, None
