"""The method as plain torch: folding, bag weights, the multi-hot loss and the schedule of phases."""

from megatron_tst.superposition.folding import fold_labels, fold_tokens
from megatron_tst.superposition.loss import (
    multi_hot_cross_entropy,
    target_coefficients,
    target_weights,
)
from megatron_tst.superposition.schedule import Phase, PhasePoint, Schedule
from megatron_tst.superposition.weights import BAG_WEIGHTS, bag_weights

__all__ = [
    "BAG_WEIGHTS",
    "Phase",
    "PhasePoint",
    "Schedule",
    "bag_weights",
    "fold_labels",
    "fold_tokens",
    "multi_hot_cross_entropy",
    "target_coefficients",
    "target_weights",
]
