"""Quantities that follow from a model's settings alone: sizes, parameters and FLOPs; and the hardware's peaks."""

from megatron_tst.shape.flops import forward_flops_per_sequence, step_flops
from megatron_tst.shape.model_shape import ModelShape, pad_vocabulary, resolve_shape, virtual_stages

__all__ = [
    "ModelShape",
    "forward_flops_per_sequence",
    "pad_vocabulary",
    "resolve_shape",
    "step_flops",
    "virtual_stages",
]
