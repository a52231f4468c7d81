"""An optimizer's state of one weight, as for a weight that has just been initialised."""

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


@torch.no_grad()
def forget_history(optimizer: ChainedOptimizer, parameter: Tensor) -> None:
    """Take a parameter's new values for its main weights, and set its moments to zero.

    Adam's count of steps goes on: optimizers keep one for all parameters, and so do checkpoints.

    Args:
        optimizer: of the model.
        parameter: of the model, or of one of its shards; the whole of it holds the new values on every rank.
    """
    for part in optimizer.chained_optimizers:
        main = _main_weights(part, parameter)
        if main is None:
            continue
        for name, value in part.optimizer.state.get(main, {}).items():
            if name != "step":
                value.zero_()


def _main_weights(part: object, parameter: Tensor) -> Tensor | None:
    """Give the main weights a parameter's values, and return them; None where the optimizer has none on this rank."""
    if isinstance(part, DistributedOptimizer):
        if parameter not in part.model_param_group_index_map:
            return None
        group, place = part.model_param_group_index_map[parameter]
        main: Tensor = part.optimizer.param_groups[group]["params"][place]
        span = part._get_model_param_range_map(parameter)["param"]
        values = parameter.view(-1)[span.start : span.end]
    else:
        main, values = getattr(parameter, "main_param", parameter), parameter
    # In float32 the main weights are the parameter itself.
    if main.data_ptr() != values.data_ptr():
        main.copy_(values)
    return main
