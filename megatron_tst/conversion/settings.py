"""Converts settings to Hugging Face's config.json and back; settings without a counterpart are errors or warnings."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_tst.config import ModelSettings, RunConfig, UserError, check_layout, config_from_mapping
from megatron_tst.conversion.llama import LLAMA
from megatron_tst.conversion.qwen3 import QWEN3
from megatron_tst.conversion.qwen3_moe import QWEN3_MOE
from megatron_tst.conversion.tables import Architecture
from megatron_tst.conversion.tokenizer_files import TokenIds
from megatron_tst.shape import resolve_shape

ARCHITECTURES = (LLAMA, QWEN3, QWEN3_MOE)

# Key in config.json of each setting.
SHARED_SETTINGS: dict[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "attention_dropout": "attention_dropout",
    "init_method_std": "initializer_range",
    "vocab_size": "vocab_size",
}
# Keys of config.json whose only supported value is also their default.
SHARED_ALWAYS: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False}
# Defaults of transformers for missing keys. It has defaults for the sizes of a model too, but they are never intended.
SHARED_ABSENT: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Keys that transformers does not accept as null; for all other keys, null is the same as a missing key.
NEVER_NULL = (
    "rms_norm_eps",
    "rope_theta",
    "hidden_act",
    "num_experts_per_tok",
    "norm_topk_prob",
    "decoder_sparse_step",
)
# Settings that are not whole numbers.
FRACTIONS = ("norm_epsilon", "attention_dropout", "init_method_std", "moe_aux_loss_coeff")
# Values of settings that every supported architecture has.
EXPRESSIBLE: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
}


def architecture_of(model: ModelSettings) -> Architecture:
    """Choose the Hugging Face architecture that computes the same as a model of these settings.

    Raises:
        UserError: naming the setting that no architecture supports.
    """
    for setting, wanted in EXPRESSIBLE.items():
        value = getattr(model, setting)
        if value != wanted:
            raise UserError(f"{_flag(setting)} {value}: no Hugging Face architecture supports it, only {wanted}")
    experts = model.num_experts is not None
    for architecture in ARCHITECTURES:
        if (architecture.qk_layernorm, architecture.experts) == (model.qk_layernorm, experts):
            return architecture
    raise UserError(f"--num-experts {model.num_experts}: no Hugging Face architecture has it without --qk-layernorm")


def inexpressible(model: ModelSettings) -> list[str]:
    """Return one warning per setting that the Hugging Face class ignores."""
    capacity = model.moe_expert_capacity_factor
    if model.num_experts is None or capacity is None:
        return []
    return [
        f"--moe-expert-capacity-factor {capacity}: Hugging Face's experts have no capacity limit: they also compute "
        "the positions that a full expert drops here"
    ]


def config_json(model: ModelSettings, vocab_size: int, token_ids: TokenIds, dtype: str) -> dict[str, Any]:
    """Return settings as the contents of config.json, with the keys that all versions of transformers read.

    Args:
        model: complete settings of the model.
        vocab_size: number of tokens in the vocabulary.
        token_ids: ids of the special tokens.
        dtype: torch's name of the weights' type, such as ``bfloat16``.

    Raises:
        UserError: naming a setting that no architecture supports.
    """
    architecture = architecture_of(model)
    shape = resolve_shape(model, vocab_size)
    values = {
        **{setting: getattr(model, setting) for setting in (*SHARED_SETTINGS, *architecture.settings)},
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "max_position_embeddings": shape.max_position_embeddings,
        "vocab_size": vocab_size,
    }
    if shape.num_experts:
        values["moe_ffn_hidden_size"] = shape.moe_ffn_hidden_size
    keys = {**SHARED_SETTINGS, **architecture.settings}
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **{key: values[setting] for setting, key in keys.items()},
        "rope_theta": float(model.rotary_base),
        "rope_scaling": None,
        "tie_word_embeddings": shape.is_tied,
        **SHARED_ALWAYS,
        **architecture.always,
        **architecture.stated,
        **architecture.inert,
        **token_ids.as_keys(),
        "torch_dtype": dtype,
        "use_cache": True,
    }


def read_config_json(config: Mapping[str, Any], source: str) -> tuple[Architecture, ModelSettings, TokenIds]:
    """Read the contents of config.json, written by any version of transformers.

    Args:
        config: contents of the file.
        source: name of the file, for messages.

    Raises:
        UserError: if the architecture is unknown, or a key is missing or has a value that the model does not support.
    """
    architecture = next((known for known in ARCHITECTURES if known.model_type == config.get("model_type")), None)
    if architecture is None:
        known = ", ".join(candidate.model_type for candidate in ARCHITECTURES)
        raise UserError(f"{source}: model_type {config.get('model_type')!r}: unknown architecture; known are {known}")
    given = _given(config, architecture)
    keys = {**SHARED_SETTINGS, **architecture.settings}
    _check_sizes(given, [key for setting, key in keys.items() if setting not in FRACTIONS], source)
    _check_values(given, architecture, source)
    model = {
        **EXPRESSIBLE,
        **{setting: given[key] for setting, key in keys.items()},
        "group_query_attention": given["num_key_value_heads"] != given["num_attention_heads"],
        "qk_layernorm": architecture.qk_layernorm,
        "rotary_base": _rotary_base(given, source),
        "untie_embeddings_and_output_weights": not given["tie_word_embeddings"],
        "hidden_dropout": 0.0,
    }
    settings = config_from_mapping({"model": model}, source).model
    try:
        check_layout(RunConfig(model=settings))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return architecture, settings, TokenIds.from_keys(given, source)


def _given(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return all keys with the values that transformers uses, including its defaults for missing and null keys."""
    absent = {**SHARED_ABSENT, **architecture.absent}
    given = {**absent, **{key: value for key, value in config.items() if value is not None or key in NEVER_NULL}}
    if "num_local_experts" in given:  # the name in transformers 5
        given.setdefault("num_experts", given["num_local_experts"])
    if given.get("hidden_act") == "swish":  # another name of the same function
        given["hidden_act"] = "silu"
    heads, hidden = given.get("num_attention_heads"), given.get("hidden_size")
    for key, implied in (("num_key_value_heads", heads), ("head_dim", _quotient(hidden, heads))):
        if key not in given or (key in config and config[key] is None):
            given[key] = implied
    return given


def _quotient(hidden: Any, heads: Any) -> int | None:
    sizes = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
    return hidden // heads if sizes else None


def _check_sizes(given: Mapping[str, Any], keys: list[str], source: str) -> None:
    for key in keys:
        value = given.get(key)
        if key not in given:
            raise UserError(f"{source}: {key}: is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{source}: {key} {value!r}: must be a whole number above 0")


def _check_values(given: Mapping[str, Any], architecture: Architecture, source: str) -> None:
    for key, wanted in {**SHARED_ALWAYS, **architecture.always, **architecture.stated}.items():
        value = given.get(key, None if key in architecture.stated else wanted)
        if value != wanted:
            raise UserError(f"{source}: {key} {value!r}: cannot be converted, only {wanted!r} is supported")
    layers = given.get("layer_types", [])
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise UserError(f"{source}: layer_types {layers!r}: only 'full_attention' in every layer can be converted")
    if given.get("per_layer_config"):
        raise UserError(f"{source}: per_layer_config: cannot be converted, because all layers share their settings")
    for setting, key in {**SHARED_SETTINGS, **architecture.settings}.items():
        value = given[key]
        if setting in FRACTIONS and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise UserError(f"{source}: {key} {value!r}: must be a number, at least 0")


def _rotary_base(given: Mapping[str, Any], source: str) -> int:
    """Return the base of rotary embeddings: transformers 5 keeps it in ``rope_parameters``, 4 in ``rope_theta``."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = given.get(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{source}: {key} {value!r}: must be an object")
        rope |= value
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    if kind != "default" or share != 1.0:
        raise UserError(
            f"{source}: rope of type {kind!r} over {share} of a head: only 'default' over the whole head is supported"
        )
    base = rope.get("rope_theta", given["rope_theta"])
    number = not isinstance(base, bool) and isinstance(base, int | float) and math.isfinite(base)
    if not number or base != int(base) or base < 1:
        raise UserError(f"{source}: rope_theta {base!r}: must be a whole number above 0, as --rotary-base is")
    return int(base)


def _flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")
