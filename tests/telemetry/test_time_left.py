from megatron_tst.telemetry.time_left import seconds_left


def test_each_phase_has_its_own_pace():
    assert seconds_left((30, 100), 10, {0: 2.0, 1: 1.0}) == 20 * 2.0 + 70 * 1.0
    assert seconds_left((30, 100), 40, {0: 2.0, 1: 1.0}) == 60.0
    assert seconds_left((30, 100), 100, {0: 2.0, 1: 1.0}) == 0.0


def test_a_future_phase_takes_the_pace_of_the_nearest_phase():
    assert seconds_left((30, 100, 110), 10, {0: 2.0}) == 100 * 2.0
    assert seconds_left((30, 100, 110), 40, {0: 2.0, 1: 1.0}) == 60 + 10 * 1.0
