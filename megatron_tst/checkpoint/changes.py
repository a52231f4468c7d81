"""Differences between a checkpoint's settings and those of the run that resumes from it, and which are refused."""

import dataclasses
import logging
from typing import Any

from megatron_tst.checkpoint.run_state import RunState
from megatron_tst.config import CheckpointSettings, ModelSettings, RunConfig, UserError
from megatron_tst.config.effects import effect_of
from megatron_tst.shape import resolve_shape
from megatron_tst.superposition import Phase, Schedule

logger = logging.getLogger(__name__)


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
        _flat({**dataclasses.asdict(config), "model": _resolved(config.model), "megatron_lm": None})
        for config in (saved, wanted)
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


def check_changes(changes: list[Change], settings: CheckpointSettings, is_main: bool) -> None:
    """Refuse changes by which the run would be another one, and tell of the others.

    Raises:
        UserError: naming the setting.
    """
    for change in changes:
        effect = effect_of(RunConfig, change.name)
        if effect.is_binding and effect.alters_function:
            raise UserError(f"{change}; another model cannot load it")
        if effect.alters_optimizer_state and not settings.no_load_optim:
            raise UserError(f"{change}; its optimizer state has another shape, add --no-load-optim to skip it")
        if effect.is_binding and not settings.override_run_config:
            raise UserError(f"{change}; to continue nevertheless, add --override-run-config")
        if is_main:
            logger.info("changed: %s", change)


def check_phases(saved: tuple[Phase, ...], wanted: tuple[Phase, ...]) -> None:
    """Refuse phases in the YAML file that differ in more than the length of the last phase.

    Raises:
        UserError: if they do.
    """
    kinds = [[(phase.bag_size, phase.reads_bags) for phase in phases] for phases in (saved, wanted)]
    lengths = [[phase.num_steps for phase in phases[:-1]] for phases in (saved, wanted)]
    if kinds[0] != kinds[1] or lengths[0] != lengths[1]:
        raise UserError(
            f"phases: differ from the checkpoint's {[(phase.bag_size, phase.num_steps) for phase in saved]} in more "
            "than the steps of the last; to continue nevertheless, add --override-run-config"
        )


def check_identity(state: RunState, *, tokenizer_sha256: str, global_batch_size: int) -> None:
    """Check that a resumed run reads the same text as it would have without the interruption.

    Args:
        state: run state of the checkpoint.
        tokenizer_sha256: SHA-256 of the tokenizer file.
        global_batch_size: number of sequences per step.

    Raises:
        UserError: naming the first thing that differs.
    """
    if state.global_batch_size != global_batch_size:
        raise UserError(
            f"--global-batch-size {global_batch_size}: the checkpoint was made with {state.global_batch_size}; "
            "to continue on other text than the run would have read, add --override-run-config"
        )
    if state.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"--tokenizer-model: is not the one that the checkpoint was made with ({state.tokenizer}); "
            "to continue with another, add --override-run-config"
        )


def prolonged(schedule: Schedule, num_steps: int) -> Schedule:
    """Return the phases with the last one made longer or shorter, so that the run has ``num_steps`` steps.

    Raises:
        UserError: if there are too few.
    """
    *before, last = schedule.phases
    steps = num_steps - sum(phase.num_steps for phase in before)
    if steps < 1:
        raise UserError(f"--train-iters {num_steps}: ends before the checkpoint's last phase begins")
    return Schedule((*before, Phase(last.bag_size, steps, last.reads_bags)))
