"""torch's Adam under megatron-core's distributed optimizer, made able to save and to resume.

Without Transformer Engine and Apex, megatron-core 0.16.1 shards the state of torch's Adam, whose step count is a
tensor per parameter; its checkpoint code was written for optimizers that count in the parameter group.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_tst.megatron_patches.optimizer_state import KeptStateOptimizer


class TorchAdamDistributedOptimizer(KeptStateOptimizer):
    """megatron-core's distributed optimizer over torch's Adam, its three faults of saving and loading repaired."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is not sharded.

        The original reads the step count of the first parameter: there is none before the first step.
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

        The original leaves the step count out of what it loads, then asks for it.
        """
        group, place = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][place]
        step = self.optimizer.state[main_param]["step"]
        super()._set_main_param_and_optimizer_states(model_param, {"step": step, **tensors})

    def _allocate(self) -> None:
        """Give every parameter the state that Adam's first step would."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def make_resumable(optimizer: Any) -> None:
    """Let ``optimizer``, if it is a distributed one, keep its state by parameter, and repair it over torch's Adam."""
    if type(optimizer) is DistributedOptimizer:
        over_torch = isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW)
        optimizer.__class__ = TorchAdamDistributedOptimizer if over_torch else KeptStateOptimizer
