"""What follows from a model's settings alone: parameters, FLOPs, and the hardware's peaks."""

from megatron_tst.shape.flops import forward_flops_per_sequence, step_flops

__all__ = ["forward_flops_per_sequence", "step_flops"]
