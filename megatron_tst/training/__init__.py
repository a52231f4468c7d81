"""The own trainer: loop, optimizer step, evaluation, optimizer and learning-rate schedule."""

from megatron_tst.preflight import check_cluster
from megatron_tst.training.build import build_run, start_run
from megatron_tst.training.evaluation import evaluate
from megatron_tst.training.loop import train
from megatron_tst.training.run import Run
from megatron_tst.training.step import Stepper, StepReport

__all__ = ["Run", "StepReport", "Stepper", "build_run", "check_cluster", "evaluate", "start_run", "train"]
