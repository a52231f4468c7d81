"""Builds megatron-core's AdamW and learning-rate schedule from the settings."""

import math

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_tst.config import OptimizerSettings
from megatron_tst.megatron_patches.adam import make_resumable


def build_optimizer(
    settings: OptimizerSettings, chunks: list[torch.nn.Module], bf16: bool, overlap_param_gather: bool
) -> MegatronOptimizer:
    """Build AdamW over this rank's model chunks; norms and biases get no weight decay.

    Collective: every rank of the world calls it.

    Args:
        settings: learning rates, betas, clipping and sharding.
        chunks: model chunks of this rank, as returned by :func:`megatron_tst.model.build_model`.
        bf16: whether weights are bfloat16 with float32 main weights.
        overlap_param_gather: whether sharded parameters are gathered during the forward pass.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=overlap_param_gather,
    )
    sharded_by_kind = get_megatron_optimizer(config, chunks).chained_optimizers
    for optimizer in sharded_by_kind:
        make_resumable(optimizer)
    return CautiousOptimizer(sharded_by_kind)


class CautiousOptimizer(ChainedOptimizer):  # type: ignore[misc]
    """megatron-core's optimizer, except that a gradient that is not finite leaves weights and moments unchanged."""

    def get_grad_norm(self) -> float:
        """Compute the global gradient norm and remember it."""
        self._grad_norm = float(super().get_grad_norm())
        return self._grad_norm

    def step_with_ready_grads(self) -> bool:
        """Update the weights if the gradient is finite; return whether it was."""
        return math.isfinite(self._grad_norm) and bool(super().step_with_ready_grads())


def build_scheduler(
    settings: OptimizerSettings, optimizer: MegatronOptimizer, train_iters: int, global_batch_size: int
) -> OptimizerParamScheduler:
    """Build the learning-rate schedule; like Megatron-LM it counts in sequences.

    Args:
        settings: peak value, final value and shape of the learning rate.
        optimizer: the optimizer whose learning rate is set.
        train_iters: number of optimizer steps of the run.
        global_batch_size: number of sequences per step.
    """
    decay_iters = settings.lr_decay_iters or train_iters
    wsd_decay_iters = settings.lr_wsd_decay_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters * global_batch_size,
        lr_decay_steps=decay_iters * global_batch_size,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=train_iters * global_batch_size,
        wd_incr_style="constant",
        wsd_decay_steps=None if wsd_decay_iters is None else wsd_decay_iters * global_batch_size,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )
