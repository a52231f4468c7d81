"""The configuration of the model that Megatron-LM builds, with a hook that gives it the bag axis."""

from argparse import Namespace
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

from megatron_tst.model import LossChoice, superpose_model
from megatron_tst.model.build import reduce_experts_apart
from megatron_tst.model.layers import block_spec

# Layer settings and their values in the models that the own trainer can build, too.
_PLAIN_LAYERS: dict[str, Any] = {
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "layernorm_zero_centered_gamma": False,
    "moe_layer_freq": 1,
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "window_size": None,
}


def model_config(args: Namespace, vocab_size: int, loss: LossChoice) -> Any:
    """Return the configuration from which Megatron-LM builds its model, with a hook that lets the model take bags.

    Args:
        args: Megatron-LM's arguments, completed.
        vocab_size: number of tokens of the vocabulary, without padding.
        loss: loss to compute from labels.
    """
    is_hybrid = args.hybrid_layer_pattern is not None
    config = hybrid_config_from_args(args) if is_hybrid else gpt_config_from_args(args)
    if _has_own_layers(args, config.transformer):
        config.transformer_layer_spec = _local_layers

    def superpose(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Let this rank's model chunks take bags, before they are wrapped."""
        for chunk in chunks:
            superpose_model(chunk, vocab_size, loss)
            if args.expert_tensor_parallel_size != args.tensor_model_parallel_size:
                reduce_experts_apart(chunk)
        return chunks

    config.pre_wrap_hooks.append(superpose)
    return config


def _has_own_layers(args: Namespace, transformer: TransformerConfig) -> bool:
    """Return whether the model uses no Transformer Engine and can be built from the own trainer's local layers.

    These layers have torch's attention and norms, sequence and context parallelism on any device, and Transformer
    Engine's names in checkpoints. Other models use Megatron-LM's local layers.
    """
    is_plain = all(getattr(transformer, name, plain) == plain for name, plain in _PLAIN_LAYERS.items())
    is_gpt = args.spec is None and args.hybrid_layer_pattern is None
    return args.transformer_impl == "local" and is_gpt and is_plain and type(transformer) is TransformerConfig


def _local_layers(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    return block_spec(config.transformer, use_transformer_engine=False, vp_stage=vp_stage)
