"""GPTModel with a bag axis in its inputs and labels, and the functions that build it."""

from megatron_tst.model.build import build_gpt, build_model, loss_choice, transformer_config
from megatron_tst.model.embedding import VocabParallelBagEmbedding
from megatron_tst.model.gpt import TSTGPTModel
from megatron_tst.model.linear_loss import vocab_parallel_linear_multi_hot_cross_entropy
from megatron_tst.model.loss import LossChoice, vocab_parallel_multi_hot_cross_entropy
from megatron_tst.model.superposed import superpose_model

__all__ = [
    "LossChoice",
    "TSTGPTModel",
    "VocabParallelBagEmbedding",
    "build_gpt",
    "build_model",
    "loss_choice",
    "superpose_model",
    "transformer_config",
    "vocab_parallel_linear_multi_hot_cross_entropy",
    "vocab_parallel_multi_hot_cross_entropy",
]
