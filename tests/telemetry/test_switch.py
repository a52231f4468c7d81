"""What a change of the bag size does to the loss, against losses that are made for it."""

import dataclasses

import pytest

from megatron_tst.telemetry import RecoveryMetrics, SwitchMetrics
from megatron_tst.telemetry.switch import SwitchWatch

ENDS = (20, 60)


def watch(losses, lines=(), first=1, ends=ENDS):
    """All that is told of a run whose steps have these losses."""
    watching = SwitchWatch(ends, lines)
    return [
        told
        for step, loss in enumerate(losses, first)
        if loss is not None
        for told in watching.add(step, *phase_of(step, ends), float(loss))
    ]


def phase_of(step, ends=ENDS):
    """Number and bag size of a step's phase."""
    is_first = step <= 20
    return (0, 4 if len(ends) > 1 else 1) if is_first or len(ends) == 1 else (1, 1)


# Falling to 4.0 in the last ten steps, up to 6, then down by a tenth a step.
BEFORE = [5.0] * 10 + [4.0] * 10
AFTER = [6.0 - 0.1 * step for step in range(40)]


def test_height_and_length_of_a_spike():
    switch, recovery = watch(BEFORE + AFTER)
    assert switch == SwitchMetrics(21, 20, 4, 1, 4.0, 6.0)
    assert (recovery.switched_after_step, recovery.spike) == (20, 2.0)
    # The mean of ten steps is at 4.0 when its last is at 3.55: the 26th.
    assert recovery.recovery_steps == 26
    assert recovery.step == 46


def test_one_lucky_step_is_no_recovery():
    lucky = [3.9 if step == 12 else loss for step, loss in enumerate(AFTER)]
    assert watch(BEFORE + lucky)[1].recovery_steps == pytest.approx(26, abs=3)


def test_a_loss_that_does_not_rise_is_back_at_once():
    assert watch(BEFORE + [3.5] * 40)[1] == RecoveryMetrics(21, 20, -0.5, 1)


def test_a_loss_that_never_comes_back():
    assert watch(BEFORE + [5.0] * 40)[1] == RecoveryMetrics(60, 20, 1.0, None)


def test_a_first_step_that_is_not_applied_hides_no_switch():
    switch, recovery = watch([*BEFORE, None, *AFTER[1:]])
    assert (switch.step, switch.switched_after_step, switch.loss_after_switch) == (22, 20, AFTER[1])
    assert recovery.spike == pytest.approx(1.9)


def test_an_ordinary_run_has_no_switch():
    assert watch(BEFORE + AFTER, ends=(60,)) == []


def as_lines(told, losses, last):
    steps = [
        {"kind": "step", "step": step, "phase": phase_of(step)[0], "bag_size": phase_of(step)[1], "loss": loss}
        for step, loss in enumerate(losses, 1)
    ]
    lines = steps + [{"kind": metrics.kind, **dataclasses.asdict(metrics)} for metrics in told]
    return sorted((line for line in lines if line["step"] <= last), key=lambda line: line["step"])


@pytest.mark.parametrize("stopped_after", [15, 20, 21, 30, 46, 50])
def test_a_run_that_was_stopped_tells_the_same(stopped_after):
    """Where every step is logged; the height is remembered from the first step after the switch."""
    losses = BEFORE + AFTER
    whole = watch(losses)
    lines = as_lines(whole, losses, stopped_after)
    rest = watch(losses[stopped_after:], lines, first=stopped_after + 1)
    assert rest == [metrics for metrics in whole if metrics.step > stopped_after]


def test_the_level_is_of_the_steps_before_the_switch_not_before_the_stop():
    """Stopped after 15 steps, with a line at the tenth: of steps 11 to 20, which count, 16 to 20 are known."""
    lines = [{"kind": "step", "step": 10, "phase": 0, "bag_size": 4, "loss": 9.0}]
    (switch, *_) = watch([4.0] * 5 + AFTER, lines, first=16)
    assert switch.loss_before_switch == 4.0


def test_a_switch_that_is_not_overcome_is_closed_by_the_next():
    """Three phases; the second one's last step is not applied."""
    watching = SwitchWatch((20, 40, 60))
    told = []
    for step in range(1, 61):
        if step != 40:
            phase = (step - 1) // 20
            told += watching.add(step, phase, (4, 2, 1)[phase], (3.0, 5.0, 4.0)[phase])
    assert [type(metrics).__name__ for metrics in told] == ["SwitchMetrics", "RecoveryMetrics"] * 2
    assert (told[1].switched_after_step, told[1].recovery_steps) == (20, None)
    assert (told[3].switched_after_step, told[3].recovery_steps) == (40, 1)


def test_lines_of_long_ago_are_no_level():
    """With a line every fifteen steps, only the phase's last step is near enough to the switch."""
    lines = [
        {"kind": "step", "step": step, "phase": 0, "bag_size": 4, "loss": loss} for step, loss in ((5, 9.0), (20, 4.0))
    ]
    (switch, *_) = watch(AFTER, lines, first=21)
    assert switch.loss_before_switch == 4.0
