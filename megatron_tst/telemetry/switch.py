"""Measures how far the loss rises after a change of the bag size, and how soon it recovers."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from megatron_tst.telemetry.metrics import RecoveryMetrics, SwitchMetrics

# The loss of a single step is noisy, so the level of the loss is a mean over ten steps.
LEVEL_STEPS = 10


class SwitchWatch:
    """Follows the loss of every step across the switches of a run."""

    def __init__(self, ends: Sequence[int], lines: Sequence[Mapping[str, Any]] = ()) -> None:
        """Start from scratch, or from the metric lines of a run that was stopped.

        Args:
            ends: number of completed steps at the end of each phase.
            lines: lines of ``metrics.jsonl`` so far.
        """
        self._ends = tuple(ends)
        self._losses: deque[tuple[int, float]] = deque(maxlen=LEVEL_STEPS)  # pairs of step and loss
        self._phase, self._bag_size = 0, 1
        self._switch: SwitchMetrics | None = None
        self._highest = 0.0
        for line in lines:
            self._remember(line)

    def _remember(self, line: Mapping[str, Any]) -> None:
        kind = line["kind"]
        if kind == "switch":
            # The lines hold only logged steps, so the level before the switch is taken from its own line.
            self._begin(SwitchMetrics(**{field.name: line[field.name] for field in dataclasses.fields(SwitchMetrics)}))
        elif kind == "recovery":
            self._switch = None
        elif kind == "step":
            self._see(line["step"], line["phase"], line["bag_size"], line["loss"])

    def add(self, step: int, phase: int, bag_size: int, loss: float) -> Iterator[SwitchMetrics | RecoveryMetrics]:
        """Add the loss of a step, and yield the metric lines that follow from it.

        Args:
            step: 1-based number of the step; steps that were not applied may be omitted.
            phase: 0-based index of the phase.
            bag_size: bag size of the phase.
            loss: loss of the step, in nats per position.
        """
        if phase != self._phase:
            last = self._ends[phase - 1]
            before = self._level(last)
            if self._switch:
                yield self._end(step, is_back=False)
            if before is not None:
                self._begin(SwitchMetrics(step, last, self._bag_size, bag_size, before, loss))
                assert self._switch
                yield self._switch
        self._see(step, phase, bag_size, loss)
        level = self._level(step)
        if self._switch and level is not None:
            is_back = level <= self._switch.loss_before_switch
            if is_back or step in self._ends:
                yield self._end(step, is_back)

    def _level(self, step: int) -> float | None:
        """Return the mean loss of the known steps among the ten steps up to this one, or None."""
        losses = [loss for at, loss in self._losses if step - LEVEL_STEPS < at <= step]
        return fmean(losses) if losses else None

    def _end(self, step: int, is_back: bool) -> RecoveryMetrics:
        switch, self._switch = self._switch, None
        assert switch
        after, spike = switch.switched_after_step, self._highest - switch.loss_before_switch
        return RecoveryMetrics(step, after, spike, step - after if is_back else None)

    def _begin(self, switch: SwitchMetrics) -> None:
        self._switch, self._highest = switch, switch.loss_after_switch
        self._losses.clear()

    def _see(self, step: int, phase: int, bag_size: int, loss: float) -> None:
        self._losses.append((step, loss))
        self._phase, self._bag_size, self._highest = phase, bag_size, max(self._highest, loss)
