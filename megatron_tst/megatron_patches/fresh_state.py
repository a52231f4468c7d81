"""Reset an optimizer's state of one weight to that of a newly initialised weight."""

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


@torch.no_grad()
def forget_history(optimizer: ChainedOptimizer, parameter: Tensor) -> None:
    """Copy a parameter's new values to its main weights and set its moments to zero.

    Adam's step count is not reset, because optimizers and checkpoints have one count for all parameters.

    Args:
        optimizer: the model's optimizer.
        parameter: a parameter of the model or of one of its shards, which holds all new values on every rank.
    """
    for part in optimizer.chained_optimizers:
        main = _main_weights(part, parameter)
        if main is None:
            continue
        for name, value in part.optimizer.state.get(main, {}).items():
            if name != "step":
                value.zero_()


def _main_weights(part: object, parameter: Tensor) -> Tensor | None:
    """Copy a parameter's values to its main weights and return these; None if this rank's optimizer has none."""
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
