"""Calls the stages of a run from within Megatron-LM's trainer, around functions that the trainer calls by name.

Megatron-LM's ``pretrain`` takes a model, data and a forward step as arguments, but no hooks for the stages of a run.
So during a run the functions below are replaced in ``megatron.training.training``, each by a function that calls the
original.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from megatron.core.datasets import utils
from megatron.training import get_args, training
from torch import Tensor

from megatron_tst.megatron_patches.adam import make_resumable
from megatron_tst.megatron_patches.shard_writer import planning_for_threads
from megatron_tst.telemetry.run_metrics import learning_rates


class Stages(Protocol):
    """The methods of a run that are called at the stages of training."""

    def set_up(self) -> None:
        """Set up the run, after the ranks have joined and before the model is built."""

    def begin(self) -> None:
        """Begin the run, before the first step."""

    def stepped(
        self, step: int, losses: dict[str, Tensor], grad_norm: float, lr_by_group: dict[str, float], started_s: float
    ) -> None:
        """React to a step whose update was applied."""

    def evaluated(self, losses: dict[str, Any]) -> None:
        """React to an evaluation."""

    def is_save_due(self, step: int) -> bool:
        """Return whether a checkpoint must be written although no save interval ends."""

    def is_stop_asked(self) -> bool:
        """Return whether to save and stop; the answer is the same on every rank."""

    def saving(self, step: int) -> None:
        """Prepare for a checkpoint that is about to be written."""

    def saved(self, step: int) -> None:
        """React to a checkpoint that was written."""


@contextlib.contextmanager
def taking_part(stages: Stages, has_cuda: bool) -> Iterator[None]:
    """Replace the functions of the trainer within the context."""
    replacements: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
        "initialize_megatron": lambda stock: _initialize(stock, stages, has_cuda),
        "get_megatron_optimizer": _build_optimizer,
        "train": lambda stock: _train(stock, stages),
        "train_step": lambda stock: _train_step(stock, stages),
        "evaluate": lambda stock: _evaluate(stock, stages),
        "save_checkpoint_and_time": lambda stock: _save(stock, stages),
        "checkpoint_and_decide_exit": lambda stock: _decide(stock, stages),
    }
    stocks = {name: getattr(training, name) for name in replacements}
    compile_helpers = utils.compile_helpers
    for name, replace in replacements.items():
        setattr(training, name, replace(stocks[name]))
    # The wheel contains the compiled helpers, and no makefile to compile them with.
    utils.compile_helpers = _do_nothing
    try:
        yield
    finally:
        for name, stock in stocks.items():
            setattr(training, name, stock)
        utils.compile_helpers = compile_helpers


def _do_nothing() -> None:
    pass


def _initialize(stock: Callable[..., Any], stages: Stages, has_cuda: bool) -> Callable[..., Any]:
    def initialize(*args: Any, **kwargs: Any) -> Any:
        """Join the ranks, on the CPU if there is no CUDA device, and set up the run."""
        result = stock(*args, **kwargs, allow_no_cuda=not has_cuda)
        stages.set_up()
        return result

    return initialize


def _build_optimizer(stock: Callable[..., Any]) -> Callable[..., Any]:
    def build(*args: Any, **kwargs: Any) -> Any:
        """Build the optimizer, and patch it so that a sharded one can be saved and resumed."""
        optimizer = stock(*args, **kwargs)
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            make_resumable(part)
        return optimizer

    return build


def _train(stock: Callable[..., Any], stages: Stages) -> Callable[..., Any]:
    def train(*args: Any, **kwargs: Any) -> Any:
        """Begin the run and train."""
        stages.begin()
        return stock(*args, **kwargs)

    return train


def _train_step(stock: Callable[..., Any], stages: Stages) -> Callable[..., Any]:
    def train_step(forward: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Take a step and report it."""
        started_s = time.perf_counter()
        lr_by_group = learning_rates(optimizer.param_groups)
        result = stock(forward, data, model, optimizer, *args, **kwargs)
        losses, skipped, _, is_exit, _, grad_norm, *_ = result
        if not skipped and not is_exit:
            stages.stepped(kwargs["iteration"] + 1, losses, float(grad_norm), lr_by_group, started_s)
        return result

    return train_step


def _evaluate(stock: Callable[..., Any], stages: Stages) -> Callable[..., Any]:
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        """Evaluate and report the result."""
        result = stock(*args, **kwargs)
        losses, _, is_out_of_time = result
        if not is_out_of_time:
            stages.evaluated(losses)
        return result

    return evaluate


def _save(stock: Callable[..., Any], stages: Stages) -> Callable[..., Any]:
    def save(iteration: int, *args: Any, **kwargs: Any) -> Any:
        """Save a checkpoint with the state of the run."""
        stages.saving(iteration)
        # Threads write a synchronous save, so no manager process is needed. It would be spawned only to return the
        # results, import the program again, and outlive a run that is killed.
        waits_for_it = not get_args().async_save
        with planning_for_threads() if waits_for_it else contextlib.nullcontext():
            result = stock(iteration, *args, **kwargs)
        stages.saved(iteration)
        return result

    return save


def _decide(stock: Callable[..., Any], stages: Stages) -> Callable[..., Any]:
    def decide(model: Any, optimizer: Any, scheduler: Any, iteration: int, flops: Any, context: Any, data: Any) -> bool:
        """Save if an interval or a phase ends or the run is asked to stop, and return whether to stop."""
        arguments = (model, optimizer, scheduler, iteration, flops, context)
        saves: list[int] = []
        with _noting_saves(saves):
            is_over = bool(stock(*arguments, data))
        is_asked = stages.is_stop_asked()
        if not saves and (is_asked or stages.is_save_due(iteration)):
            training.save_checkpoint_and_time(iteration, *arguments[:3], flops, context, train_data_iterator=data)
        return is_over or is_asked

    return decide


@contextlib.contextmanager
def _noting_saves(saves: list[int]) -> Iterator[None]:
    save = training.save_checkpoint_and_time

    def noting(iteration: int, *args: Any, **kwargs: Any) -> Any:
        """Save a checkpoint and note its step."""
        saves.append(iteration)
        return save(iteration, *args, **kwargs)

    training.save_checkpoint_and_time = noting
    try:
        yield
    finally:
        training.save_checkpoint_and_time = save
