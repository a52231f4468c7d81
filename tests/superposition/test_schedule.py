import pytest

from megatron_tst.superposition import Phase, Schedule


def test_superposed_schedule_has_the_papers_two_phases():
    schedule = Schedule.superposed(bag_size=6, step_ratio=0.3, num_steps=20000)
    assert schedule.phases == (Phase(6, 6000), Phase(1, 14000))
    assert schedule.num_steps == 20000
    assert schedule.ends == (6000, 20000)


@pytest.mark.parametrize(("bag_size", "ratio"), [(1, 0.3), (6, 0.0)])
def test_schedule_without_superposition_is_one_ordinary_phase(bag_size, ratio):
    assert Schedule.superposed(bag_size, ratio, 10).phases == (Phase(1, 10),)


def test_phase_at_counts_from_zero_and_switches_when_a_phase_ends():
    schedule = Schedule((Phase(4, 3), Phase(2, 2), Phase(1, 1)))
    found = [(p.index, p.bag_size, p.step) for p in map(schedule.phase_at, range(6))]
    assert found == [(0, 4, 0), (0, 4, 1), (0, 4, 2), (1, 2, 0), (1, 2, 1), (2, 1, 0)]
    for outside in (-1, 6):
        with pytest.raises(ValueError, match="outside the run"):
            schedule.phase_at(outside)


def test_recovery_is_an_ordinary_phase_after_a_phase_with_bags():
    for sizes, starts in (((1,), ()), ((4,), ()), ((4, 1), (3,)), ((8, 4, 1), (6,)), ((1, 4, 1, 1, 2, 1), (6, 15))):
        assert Schedule(tuple(Phase(size, 3) for size in sizes)).recovery_starts == starts


def test_counters_equal_a_loop_over_steps():
    schedule, samples, tokens = Schedule((Phase(4, 3), Phase(1, 5))), [0, 0], 0
    for step in range(schedule.num_steps):
        assert schedule.samples_per_phase(step, 8) == tuple(samples)
        assert schedule.data_tokens(step, positions_per_step=8 * 16) == tokens
        point = schedule.phase_at(step)
        samples[point.index] += 8
        tokens += 8 * 16 * point.bag_size
    assert schedule.data_tokens(8, 8 * 16) == tokens


@pytest.mark.parametrize(
    "make",
    [
        lambda: Phase(0, 5),
        lambda: Phase(2, 0),
        lambda: Schedule(()),
        lambda: Schedule.superposed(0, 0.3, 10),
        lambda: Schedule.superposed(4, 1.5, 10),
    ],
)
def test_invalid_phases_are_refused(make):
    with pytest.raises(ValueError, match=r"at least|between 0 and 1"):
        make()


def test_phase_that_reads_single_tokens_consumes_no_more_text():
    schedule = Schedule.superposed(4, 0.5, 10, reads_bags=False)
    assert schedule.phases[0] == Phase(4, 5, reads_bags=False)
    assert schedule.data_tokens(10, positions_per_step=100) == 1000
