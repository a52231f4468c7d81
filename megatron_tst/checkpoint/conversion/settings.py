"""From settings to Hugging Face's config.json and back; what one of the two cannot say is refused by name."""

from collections.abc import Mapping
from typing import Any

from megatron_tst.checkpoint.conversion.llama import LLAMA
from megatron_tst.checkpoint.conversion.qwen3 import QWEN3
from megatron_tst.checkpoint.conversion.qwen3_moe import QWEN3_MOE
from megatron_tst.checkpoint.conversion.tables import Architecture, Shape
from megatron_tst.config import ModelSettings, UserError, config_from_mapping

ARCHITECTURES = (LLAMA, QWEN3, QWEN3_MOE)

# Our setting to its key in config.json.
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
# Keys of config.json with the only value that the models here compute; left out, they mean the same.
SHARED_ALWAYS: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False}
# What every architecture here has, by setting.
EXPRESSIBLE: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
}


def architecture_of(model: ModelSettings) -> Architecture:
    """Choose the Hugging Face architecture that computes what a model of these settings does.

    Raises:
        UserError: naming the setting that none of them has.
    """
    for setting, wanted in EXPRESSIBLE.items():
        value = getattr(model, setting)
        if value != wanted:
            raise UserError(f"{_flag(setting)} {value}: has no Hugging Face architecture here, only {wanted} has")
    experts = model.num_experts is not None
    for architecture in ARCHITECTURES:
        if (architecture.qk_layernorm, architecture.experts) == (model.qk_layernorm, experts):
            return architecture
    raise UserError(f"--num-experts {model.num_experts}: has no Hugging Face architecture here without --qk-layernorm")


def shape_of(model: ModelSettings, vocab_size: int, padded_vocab_size: int) -> Shape:
    """Return the sizes that a model's weights follow from.

    Args:
        model: complete settings.
        vocab_size: tokens of the vocabulary.
        padded_vocab_size: rows of the checkpoint's embedding.
    """
    assert model.num_layers and model.hidden_size and model.num_attention_heads
    ffn = model.ffn_hidden_size or 4 * model.hidden_size
    return Shape(
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        groups=model.num_query_groups if model.group_query_attention else model.num_attention_heads,
        head_width=model.kv_channels or model.hidden_size // model.num_attention_heads,
        ffn=ffn,
        experts=model.num_experts or 0,
        expert_ffn=model.moe_ffn_hidden_size or ffn,
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size,
    )


def config_json(model: ModelSettings, vocab_size: int, end_of_document: int | None, dtype: str) -> dict[str, Any]:
    """Write settings as the contents of config.json, in the keys that all versions of transformers read.

    Args:
        model: complete settings.
        vocab_size: tokens of the vocabulary.
        end_of_document: id of the token that ends a text.
        dtype: torch's name of the weights' type, ``bfloat16``.

    Raises:
        UserError: naming a setting that no architecture has.
    """
    architecture = architecture_of(model)
    shape = shape_of(model, vocab_size, vocab_size)
    values = {
        **{setting: getattr(model, setting) for setting in (*SHARED_SETTINGS, *architecture.settings)},
        "ffn_hidden_size": shape.ffn,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_width,
        "max_position_embeddings": model.max_position_embeddings or model.seq_length,
        "vocab_size": vocab_size,
    }
    if shape.experts:
        values["moe_ffn_hidden_size"] = shape.expert_ffn
    keys = {**SHARED_SETTINGS, **architecture.settings}
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **{key: values[setting] for setting, key in keys.items()},
        "rope_theta": float(model.rotary_base),
        "rope_scaling": None,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        **SHARED_ALWAYS,
        **architecture.always,
        **architecture.stated,
        "bos_token_id": None,
        "eos_token_id": end_of_document,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def read_config_json(config: Mapping[str, Any], source: str) -> tuple[Architecture, ModelSettings]:
    """Read the contents of config.json, as any version of transformers writes it.

    Args:
        config: the contents.
        source: the file's name, for messages.

    Raises:
        UserError: if the architecture is not known, a key is missing, or has a value that megatron-core's model lacks.
    """
    architecture = next((known for known in ARCHITECTURES if known.model_type == config.get("model_type")), None)
    if architecture is None:
        known = ", ".join(candidate.model_type for candidate in ARCHITECTURES)
        raise UserError(f"{source}: model_type {config.get('model_type')!r}: unknown architecture; known are {known}")
    given = {**_implied(config), **config}
    for key, wanted in {**SHARED_ALWAYS, **architecture.always, **architecture.stated}.items():
        value = given.get(key, None if key in architecture.stated else wanted)
        if value != wanted:
            raise UserError(f"{source}: {key} {value!r}: cannot be converted, only {wanted!r} can")
    keys = {**SHARED_SETTINGS, **architecture.settings}
    missing = [key for key in keys.values() if given.get(key) is None]
    if missing:
        raise UserError(f"{source}: {missing[0]}: is missing")
    model = {
        **EXPRESSIBLE,
        **{setting: given[key] for setting, key in keys.items()},
        "group_query_attention": given["num_key_value_heads"] != given["num_attention_heads"],
        "qk_layernorm": architecture.qk_layernorm,
        "rotary_base": _rotary_base(config, source),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "hidden_dropout": 0.0,
    }
    return architecture, config_from_mapping({"model": model}, source).model


def _implied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values that older or newer versions of transformers leave to be inferred, or write under another key."""
    heads = config.get("num_attention_heads")
    implied: dict[str, Any] = {"attention_dropout": 0.0, "initializer_range": 0.02, "num_key_value_heads": heads}
    if config.get("model_type") == "llama" and heads and config.get("hidden_size"):
        implied["head_dim"] = config["hidden_size"] // heads
    if "num_local_experts" in config:
        implied["num_experts"] = config["num_local_experts"]
    return implied


def _rotary_base(config: Mapping[str, Any], source: str) -> int:
    """Return the base of rotary embeddings, which transformers 5 keeps in ``rope_parameters``, 4 in ``rope_theta``."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if kind != "default" or share != 1.0:
        raise UserError(f"{source}: rope of type {kind!r} over {share} of a head: only 'default' over all is known")
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if base != int(base):
        raise UserError(f"{source}: rope_theta {base}: --rotary-base is a whole number")
    return int(base)


def _flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")
