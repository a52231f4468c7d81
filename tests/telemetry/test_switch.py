"""The spike and recovery after a change of the bag size, measured on losses that a test chooses."""

import dataclasses

import pytest

from megatron_tst.telemetry import RecoveryMetrics, SwitchMetrics
from megatron_tst.telemetry.switch import SwitchWatch

ENDS = (20, 60)


def watch(losses, lines=(), first=1, ends=ENDS):
    """Return all metric lines of a run whose steps have these losses."""
    watching = SwitchWatch(ends, lines)
    return [
        told
        for step, loss in enumerate(losses, first)
        if loss is not None
        for told in watching.add(step, *phase_of(step, ends), float(loss))
    ]


def phase_of(step, ends=ENDS):
    """Return the number and the bag size of a step's phase."""
    is_first = step <= 20
    return (0, 4 if len(ends) > 1 else 1) if is_first or len(ends) == 1 else (1, 1)


# The loss is 4.0 in the mean of the last ten steps, rises to 6 and then falls by 0.1 per step.
BEFORE = [5.0] * 10 + [4.0] * 10
AFTER = [6.0 - 0.1 * step for step in range(40)]


def test_a_spikes_height_and_length_are_measured():
    switch, recovery = watch(BEFORE + AFTER)
    assert switch == SwitchMetrics(21, 20, 4, 1, 4.0, 6.0)
    assert (recovery.switched_after_step, recovery.spike) == (20, 2.0)
    # The mean of ten steps reaches 4.0 when the last of them is at 3.55, which is the 26th.
    assert recovery.recovery_steps == 26
    assert recovery.step == 46


def test_a_single_low_loss_does_not_count_as_recovery():
    lucky = [3.9 if step == 12 else loss for step, loss in enumerate(AFTER)]
    assert watch(BEFORE + lucky)[1].recovery_steps == pytest.approx(26, abs=3)


def test_a_loss_that_does_not_rise_recovers_at_once():
    assert watch(BEFORE + [3.5] * 40)[1] == RecoveryMetrics(21, 20, -0.5, 1)


def test_a_loss_that_never_recovers_has_no_recovery_steps():
    assert watch(BEFORE + [5.0] * 40)[1] == RecoveryMetrics(60, 20, 1.0, None)


def test_a_switch_is_recorded_if_its_first_step_is_skipped():
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
def test_a_resumed_run_records_the_same_lines(stopped_after):
    """Every step is logged here; the spike's height is restored from the first step after the switch."""
    losses = BEFORE + AFTER
    whole = watch(losses)
    lines = as_lines(whole, losses, stopped_after)
    rest = watch(losses[stopped_after:], lines, first=stopped_after + 1)
    assert rest == [metrics for metrics in whole if metrics.step > stopped_after]


def test_the_level_uses_the_steps_before_the_switch():
    """The run stops after 15 steps, with a line at step 10: of the relevant steps 11 to 20, only 16 to 20 are known."""
    lines = [{"kind": "step", "step": 10, "phase": 0, "bag_size": 4, "loss": 9.0}]
    (switch, *_) = watch([4.0] * 5 + AFTER, lines, first=16)
    assert switch.loss_before_switch == 4.0


def test_the_next_switch_ends_a_recovery():
    """The run has three phases, and the last step of the second one is not applied."""
    watching = SwitchWatch((20, 40, 60))
    told = []
    for step in range(1, 61):
        if step != 40:
            phase = (step - 1) // 20
            told += watching.add(step, phase, (4, 2, 1)[phase], (3.0, 5.0, 4.0)[phase])
    assert [type(metrics).__name__ for metrics in told] == ["SwitchMetrics", "RecoveryMetrics"] * 2
    assert (told[1].switched_after_step, told[1].recovery_steps) == (20, None)
    assert (told[3].switched_after_step, told[3].recovery_steps) == (40, 1)


def test_old_lines_do_not_count_for_the_level():
    """With a line every fifteen steps, only the phase's last step is close enough to the switch."""
    lines = [
        {"kind": "step", "step": step, "phase": 0, "bag_size": 4, "loss": loss} for step, loss in ((5, 9.0), (20, 4.0))
    ]
    (switch, *_) = watch(AFTER, lines, first=21)
    assert switch.loss_before_switch == 4.0
