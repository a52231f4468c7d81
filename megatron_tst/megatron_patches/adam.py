"""Repairs that let megatron-core's distributed optimizer save and resume torch's Adam.

Without Transformer Engine and Apex, megatron-core 0.16.1 shards the state of torch's Adam, which keeps the step count
in one tensor per parameter. Its checkpoint code expects optimizers that keep the step count in the parameter group.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_tst.megatron_patches.optimizer_state import KeptStateOptimizer


class TorchAdamDistributedOptimizer(KeptStateOptimizer):
    """megatron-core's distributed optimizer over torch's Adam, with three bugs of saving and loading repaired."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is not sharded.

        The original reads the step count of the first parameter, which does not exist before the first step.
        """
        self._allocate()
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load all state.

        The original gives every parameter the same step tensor, which Adam then advances once per parameter.
        """
        self._allocate()
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        """Set a parameter's main weights and moments.

        The original does not load the step count but then requires it.
        """
        group, place = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][place]
        step = self.optimizer.state[main_param]["step"]
        super()._set_main_param_and_optimizer_states(model_param, {"step": step, **tensors})

    def _allocate(self) -> None:
        """Give every parameter the state that Adam's first step would allocate."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def make_resumable(optimizer: Any) -> None:
    """Make a distributed optimizer save its state by parameter, and repair it if it wraps torch's Adam."""
    if type(optimizer) is DistributedOptimizer:
        over_torch = isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW)
        optimizer.__class__ = TorchAdamDistributedOptimizer if over_torch else KeptStateOptimizer
