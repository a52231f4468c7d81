"""The values that each setting may have, independent of all other settings."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tst.config.settings import RunConfig

# Some counts are stored as 32-bit integers, and no real run needs more.
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have, with the rule that a message states.

    Attributes:
        low: smallest number.
        high: largest number.
        rule: the rule in words.
        excludes_low: whether ``low`` itself is refused.
        excludes_high: whether ``high`` itself is refused.
    """

    low: float
    high: float
    rule: str
    excludes_low: bool = False
    excludes_high: bool = False

    def holds(self, value: float) -> bool:
        """Return whether a number is in the range; NaN never is."""
        above = self.low < value if self.excludes_low else self.low <= value
        below = value < self.high if self.excludes_high else value <= self.high
        return above and below


POSITIVE = Range(0, _MOST, f"must be above 0, and at most {_MOST}", excludes_low=True)
NOT_NEGATIVE = Range(0, _MOST, f"must be at least 0, and at most {_MOST}")
FRACTION = Range(0, 1, "must lie between 0 and 1")
BELOW_ONE = Range(0, 1, "must be at least 0 and below 1", excludes_high=True)
SEED = Range(0, 2**32 - 1, f"must lie between 0 and {2**32 - 1}, the seeds that numpy accepts")

RANGES: Mapping[str, Range] = {
    **dict.fromkeys(
        (
            "model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads",
            "model.num_query_groups", "model.kv_channels", "model.seq_length", "model.max_position_embeddings",
            "model.rotary_base", "model.norm_epsilon", "model.vocab_size", "model.make_vocab_size_divisible_by",
            "model.num_experts", "model.moe_ffn_hidden_size", "model.moe_router_topk",
            "model.moe_expert_capacity_factor", "superposition.tst_bag_size", "training.micro_batch_size",
            "training.global_batch_size", "training.train_iters", "training.recompute_num_layers",
            "training.max_nan_steps", "training.eval_interval", "checkpoint.save_interval", "checkpoint.keep_last",
            "checkpoint.exit_interval", "checkpoint.exit_duration_in_mins", "optimizer.lr", "optimizer.lr_decay_iters",
            "optimizer.lr_wsd_decay_iters", "parallel.tensor_model_parallel_size",
            "parallel.pipeline_model_parallel_size", "parallel.num_layers_per_virtual_pipeline_stage",
            "parallel.context_parallel_size", "parallel.expert_model_parallel_size", "parallel.ddp_bucket_size",
            "parallel.distributed_timeout_minutes", "parallel.preflight_timeout", "logging.log_interval",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(
        (
            "model.init_method_std", "model.moe_aux_loss_coeff", "model.moe_z_loss_coeff", "superposition.tst_steps",
            "data.num_workers", "training.eval_iters", "checkpoint.ckpt_step", "optimizer.min_lr",
            "optimizer.lr_warmup_iters", "optimizer.weight_decay", "optimizer.adam_eps", "optimizer.clip_grad",
            "parallel.preflight_min_gb_per_s",
        ),
        NOT_NEGATIVE,
    ),
    "model.rotary_percent": FRACTION,
    "superposition.tst_step_ratio": FRACTION,
    "model.attention_dropout": BELOW_ONE,
    "model.hidden_dropout": BELOW_ONE,
    "optimizer.adam_beta1": BELOW_ONE,
    "optimizer.adam_beta2": BELOW_ONE,
    "training.seed": SEED,
}  # fmt: skip


def range_rules(config: RunConfig) -> Iterator[tuple[bool, str, str]]:
    """Yield, for each value of a setting, whether it is allowed, the flag with the value, and the rule."""
    for name, value in _settings(config):
        flag = f"--{name.partition('.')[2].replace('_', '-')}"
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str):
                yield part.strip() != "", f"{flag} {part!r}", "must not be empty"
            elif name in RANGES and part is not None:
                yield RANGES[name].holds(part), f"{flag} {part}", RANGES[name].rule


def _settings(config: RunConfig) -> Iterator[tuple[str, Any]]:
    for section in dataclasses.fields(config):
        settings = getattr(config, section.name)
        if dataclasses.is_dataclass(settings):
            for field in dataclasses.fields(settings):
                yield f"{section.name}.{field.name}", getattr(settings, field.name)
