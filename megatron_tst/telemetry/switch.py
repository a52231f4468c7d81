"""What a change of the bag size does to the loss: how far it rises, and how soon it is back."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from megatron_tst.telemetry.metrics import RecoveryMetrics, SwitchMetrics

# One step's loss is noise; ten steps' mean is a level.
LEVEL_STEPS = 10


class SwitchWatch:
    """Watches the loss of every step over the switches of a run."""

    def __init__(self, ends: Sequence[int], lines: Sequence[Mapping[str, Any]] = ()) -> None:
        """Begin, or go on where the lines of a run that was stopped end.

        Args:
            ends: steps done at the end of each phase.
            lines: of ``metrics.jsonl`` so far.
        """
        self._ends = tuple(ends)
        self._losses: deque[tuple[int, float]] = deque(maxlen=LEVEL_STEPS)  # with their steps
        self._phase, self._bag_size = 0, 1
        self._switch: SwitchMetrics | None = None
        self._highest = 0.0
        for line in lines:
            self._remember(line)

    def _remember(self, line: Mapping[str, Any]) -> None:
        kind = line["kind"]
        if kind == "switch":
            # Only logged steps are known of what came before: the level is the one that was taken then.
            self._begin(SwitchMetrics(**{field.name: line[field.name] for field in dataclasses.fields(SwitchMetrics)}))
        elif kind == "recovery":
            self._switch = None
        elif kind == "step":
            self._see(line["step"], line["phase"], line["bag_size"], line["loss"])

    def add(self, step: int, phase: int, bag_size: int, loss: float) -> Iterator[SwitchMetrics | RecoveryMetrics]:
        """Take the loss of a step, and yield what there is to tell.

        Args:
            step: 1-based; one that was not applied may be left out.
            phase: 0-based.
            bag_size: of the phase.
            loss: nats per position.
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
        """Return the mean loss of the last ten steps up to this one, as far as they are known."""
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
