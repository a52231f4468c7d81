"""A run as a list of phases, each a bag size and a number of optimizer steps."""

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one bag size.

    Args:
        bag_size: S, data tokens per position; 1 is ordinary next-token training.
        num_steps: optimizer steps of the phase, at least 1.
        reads_bags: whether a position reads a bag; if not, it reads one token and predicts the next S.
    """

    bag_size: int
    num_steps: int
    reads_bags: bool = True

    def __post_init__(self) -> None:
        """Check that the phase has at least one step and its bags at least one token."""
        if self.bag_size < 1:
            raise ValueError(f"bag_size is {self.bag_size}; it must be at least 1")
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")

    @property
    def tokens_per_position(self) -> int:
        """Number of data tokens that one position reads."""
        return self.bag_size if self.reads_bags else 1


@dataclass(frozen=True)
class PhasePoint:
    """The place of one step in a run's schedule.

    Attributes:
        index: 0-based number of the phase.
        phase: the phase itself.
        step: 0-based step within the phase.
    """

    index: int
    phase: Phase
    step: int

    @property
    def bag_size(self) -> int:
        """Bag size S of the phase."""
        return self.phase.bag_size


@dataclass(frozen=True)
class Schedule:
    """The phases of a run, in order."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        """Accept any sequence of phases that is not empty."""
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases:
            raise ValueError("a schedule needs at least one phase")

    @classmethod
    def superposed(cls, bag_size: int, step_ratio: float, num_steps: int, reads_bags: bool = True) -> "Schedule":
        """Build the paper's two-phase run: the first ``round(step_ratio * num_steps)`` steps read bags.

        With bag size 1, or a ratio that rounds to zero steps, the run is one ordinary phase.

        Raises:
            ValueError: if ``step_ratio`` is outside 0 .. 1, or a phase is invalid.
        """
        if not 0.0 <= step_ratio <= 1.0:
            raise ValueError(f"step_ratio is {step_ratio}; it must lie between 0 and 1")
        Phase(bag_size, num_steps)
        superposed_steps = 0 if bag_size == 1 else round(step_ratio * num_steps)
        recovery_steps = num_steps - superposed_steps
        superposition = (Phase(bag_size, superposed_steps, reads_bags),) if superposed_steps else ()
        return cls(superposition + ((Phase(1, recovery_steps),) if recovery_steps else ()))

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return sum(phase.num_steps for phase in self.phases)

    @property
    def ends(self) -> tuple[int, ...]:
        """For each phase, the number of steps completed when the phase ends."""
        return tuple(accumulate(phase.num_steps for phase in self.phases))

    @property
    def recovery_starts(self) -> tuple[int, ...]:
        """For each phase of bag size 1 that follows a phase with bags, the number of steps completed when it begins."""
        pairs = zip(self.phases, self.phases[1:], self.ends, strict=False)
        return tuple(end for before, after, end in pairs if before.bag_size > 1 and after.bag_size == 1)

    def phase_at(self, step: int) -> PhasePoint:
        """Return the phase that the 0-based ``step`` belongs to and the step's index in it.

        Raises:
            ValueError: if the step lies outside the run.
        """
        start = 0
        for index, (phase, end) in enumerate(zip(self.phases, self.ends, strict=True)):
            if start <= step < end:
                return PhasePoint(index, phase, step - start)
            start = end
        raise ValueError(f"step {step} lies outside the run of {self.num_steps} steps")

    def samples_per_phase(self, step: int, global_batch_size: int) -> tuple[int, ...]:
        """Return the number of sequences that each phase has consumed after ``step`` steps."""
        starts = (0, *self.ends[:-1])
        return tuple(
            min(max(step - start, 0), phase.num_steps) * global_batch_size
            for start, phase in zip(starts, self.phases, strict=True)
        )

    def data_tokens(self, step: int, positions_per_step: int) -> int:
        """Return the number of data tokens read after ``step`` steps."""
        steps_done = self.samples_per_phase(step, 1)
        return sum(
            steps * phase.tokens_per_position * positions_per_step
            for steps, phase in zip(steps_done, self.phases, strict=True)
        )
