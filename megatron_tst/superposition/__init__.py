"""The method as plain torch: folding, bag weights, the multi-hot loss and the schedule of phases."""

from megatron_tst.superposition.folding import fold_labels, fold_tokens, slide_labels
from megatron_tst.superposition.loss import (
    OBJECTIVES,
    Objective,
    multi_hot_cross_entropy,
    row_weights,
    target_coefficients,
    target_weights,
)
from megatron_tst.superposition.schedule import Phase, PhasePoint, Schedule
from megatron_tst.superposition.weights import BAG_WEIGHTS, bag_weights

__all__ = [
    "BAG_WEIGHTS",
    "OBJECTIVES",
    "Objective",
    "Phase",
    "PhasePoint",
    "Schedule",
    "bag_weights",
    "fold_labels",
    "fold_tokens",
    "multi_hot_cross_entropy",
    "row_weights",
    "slide_labels",
    "target_coefficients",
    "target_weights",
]
