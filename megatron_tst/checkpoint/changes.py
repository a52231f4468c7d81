"""Differences between a checkpoint's settings and those of the run that resumes from it."""

import dataclasses
from typing import Any

from megatron_tst.config import ModelSettings, RunConfig
from megatron_tst.config.effects import effect_of
from megatron_tst.shape import resolve_shape


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting whose value differs from the checkpoint's.

    Attributes:
        name: name of the setting with its section, such as ``model.num_layers``.
        saved: value in the checkpoint.
        wanted: value in the resumed run.
    """

    name: str
    saved: Any
    wanted: Any

    @property
    def flag(self) -> str:
        """The setting's flag on the command line."""
        return "--" + self.name.rpartition(".")[2].replace("_", "-")

    @property
    def is_binding(self) -> bool:
        """Whether the run refuses to resume with this change."""
        return effect_of(RunConfig, self.name).is_binding

    @property
    def alters_model(self) -> bool:
        """Whether the same weights, if they can be loaded at all, compute a different function."""
        return effect_of(RunConfig, self.name).alters_function

    def __str__(self) -> str:
        """Return a line that states both values."""
        return f"{self.flag} {self.wanted}: the checkpoint was made with {self.saved}"


def find_changes(saved: RunConfig, wanted: RunConfig) -> list[Change]:
    """Return the settings that differ, except those that may change freely."""
    before, now = (
        _flat({**dataclasses.asdict(config), "model": _resolved(config.model)}) for config in (saved, wanted)
    )
    return [
        Change(name, before[name], now[name])
        for name in now
        if before[name] != now[name] and effect_of(RunConfig, name).is_reported
    ]


def _resolved(model: ModelSettings) -> dict[str, Any]:
    """Return a model's settings with defaults filled in, and with None for settings that have no effect.

    Two notations of the same model, such as with and without --kv-channels, are thus not a change.
    """
    # Sizes that depend on the vocabulary are compared with the checkpoint's tensors instead.
    shape = resolve_shape(model, vocab_size=1)
    has_experts, has_capacity = model.num_experts is not None, model.moe_expert_capacity_factor is not None
    return {
        **dataclasses.asdict(model),
        "group_query_attention": None,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "max_position_embeddings": shape.max_position_embeddings if shape.has_position_table else None,
        "rotary_base": model.rotary_base if shape.has_rope else None,
        "rotary_percent": model.rotary_percent if shape.has_rope else None,
        "ffn_hidden_size": None if has_experts else shape.ffn_hidden_size,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size if has_experts else None,
        "moe_router_topk": model.moe_router_topk if has_experts else None,
        "moe_token_drop_policy": model.moe_token_drop_policy if has_capacity else None,
    }


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
