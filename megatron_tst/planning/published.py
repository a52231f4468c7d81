"""The paper's runs and grids of final losses (arXiv 2605.06546, tables 1 and 4 to 7), and advice based on them."""

import csv
import dataclasses
import importlib.resources
import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tst.config import PRESETS, ModelSettings
from megatron_tst.shape import resolve_shape
from megatron_tst.shape.flops import PASSES, forward_flops_per_sequence
from megatron_tst.shape.hardware import GPUS
from megatron_tst.shape.parameters import count_parameters

# Our preset and the positions per step (2M and 8M as powers of two) of each of the paper's models.
MODELS = {
    "270M dense": ("270m", 2**21),
    "600M dense": ("600m", 2**21),
    "3B dense": ("3b", 2**21),
    "10B-A1B MoE": ("10b-a1b", 2**23),
}
# Noise of the grids: losses of neighboring points differ by about this much without a trend.
NOISE_NATS = 0.002


@dataclass(frozen=True)
class PublishedRun:
    """A row of table 1.

    Attributes:
        model: name of the model in the paper.
        method: baseline, tst or tst_reinitialised.
        superposition_steps: number of steps with bags.
        total_steps: number of steps of the run.
        bag_size: bag size s.
        superposition_data_tokens: data tokens read with bags, as printed.
        total_data_tokens: data tokens read in total, as printed.
        gpu_hours: GPU-hours on B200.
        final_loss: final loss in nats per token.
    """

    model: str
    method: str
    superposition_steps: int
    total_steps: int
    bag_size: int
    superposition_data_tokens: float
    total_data_tokens: float
    gpu_hours: float
    final_loss: float

    @property
    def positions_per_step(self) -> int:
        """Number of positions of a global batch."""
        return MODELS[self.model][1]

    @property
    def positions_per_s(self) -> float:
        """Throughput of one GPU that follows from the GPU-hours."""
        return self.total_steps * self.positions_per_step / (self.gpu_hours * 3600)


@dataclass(frozen=True)
class GridPoint:
    """A run of a grid: bag size s, step ratio r (0 for the baseline), final loss in nats per token."""

    bag_size: int
    step_ratio: float
    final_loss: float


@dataclass(frozen=True)
class Grid:
    """A grid over bag size and step ratio.

    Attributes:
        table: name of the table's file.
        preset: preset of the model.
        num_steps: number of steps of each run.
        bag_weights: bag weights of the loss.
        baseline: final loss without superposition.
        points: points with superposition.
    """

    table: str
    preset: str
    num_steps: int
    bag_weights: str
    baseline: float
    points: tuple[GridPoint, ...]

    @property
    def name(self) -> str:
        """Model, number of steps and bag weights."""
        return f"{self.preset}, {self.num_steps} steps, {self.bag_weights} weights"


_GRIDS = (
    ("table4_270m_20k", "270m", 20000, "uniform"),
    ("table5_270m_100k", "270m", 100000, "uniform"),
    ("table6_600m_20k", "600m", 20000, "uniform"),
    ("table7_600m_20k_power_law", "600m", 20000, "power_law"),
)


def published_runs() -> list[PublishedRun]:
    """Return table 1."""
    return [
        PublishedRun(
            row["model"],
            row["method"],
            int(row["superposition_steps"]),
            int(row["total_steps"]),
            int(row["bag_size"]),
            float(row["superposition_data_tokens"]),
            float(row["total_data_tokens"]),
            float(row["b200_gpu_hours"]),
            float(row["final_loss"]),
        )
        for row in _rows("table1_runs")
    ]


def grids() -> list[Grid]:
    """Return tables 4 to 7."""
    found = []
    for table, preset, num_steps, weights in _GRIDS:
        points = [
            GridPoint(int(row["bag_size"]), float(row["step_ratio"]), float(row["final_loss"])) for row in _rows(table)
        ]
        (baseline,) = (point.final_loss for point in points if point.bag_size == 1)
        rest = tuple(point for point in points if point.bag_size > 1)
        found.append(Grid(table, preset, num_steps, weights, baseline, rest))
    return found


def _rows(table: str) -> list[Mapping[str, str]]:
    file = importlib.resources.files("megatron_tst.planning") / "paper" / f"{table}.csv"
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def flops_per_position(model: ModelSettings) -> float:
    """Return the model FLOPs of training on one position."""
    shape = resolve_shape(model)
    return PASSES * forward_flops_per_sequence(shape) / shape.seq_length


def implied_mfu(model: ModelSettings) -> tuple[float, str]:
    """Return the fraction of a B200's peak at which the paper's most similar baseline ran, and that model's name.

    The most similar model is of the same kind (dense or MoE) and has the nearest FLOPs per position.
    """

    def distance(name: str) -> float:
        """Return the distance between two models in the logarithm of their FLOPs per position."""
        other = ModelSettings(**PRESETS[MODELS[name][0]])
        differs_in_kind = (other.num_experts is None) != (model.num_experts is None)
        return abs(math.log(flops_per_position(other) / flops_per_position(model))) + (1e9 if differs_in_kind else 0)

    nearest = min(MODELS, key=distance)
    run = next(run for run in published_runs() if run.model == nearest and run.method == "baseline")
    shape = ModelSettings(**PRESETS[MODELS[nearest][0]])
    return run.positions_per_s * flops_per_position(shape) / (GPUS["b200"].peak_tflops * 1e12), nearest


@dataclass(frozen=True)
class Advice:
    """A setting that the paper's runs suggest for a model.

    Attributes:
        source: runs that suggest it, in words.
        bag_size: bag size s.
        step_ratio: step ratio r.
        gain: nats by which the run is below the baseline with the same number of steps.
        data_ratio: data tokens divided by those of that baseline.
    """

    source: str
    bag_size: int
    step_ratio: float
    gain: float

    @property
    def data_ratio(self) -> float:
        """Data tokens divided by the baseline's: r s + 1 - r."""
        return self.step_ratio * self.bag_size + 1 - self.step_ratio


def advise(model: ModelSettings, num_steps: int, max_data_ratio: float = math.inf) -> list[Advice]:
    """Return the settings that the paper suggests for a model, within a limit on data.

    The first is the best point of the nearest grid (in parameters, then in steps). The second, if it is another, is the
    point that needs the least data among those within :data:`NOISE_NATS` of the best. The third is the setting of the
    paper's run that is nearest in size, if that run's model is nearer than the grid's.

    Args:
        model: settings of the model.
        num_steps: number of steps of the run.
        max_data_ratio: available data tokens, divided by those of a run with the same number of steps without bags.
    """
    grid = min(
        (grid for grid in grids() if grid.bag_weights == "uniform"),
        key=lambda grid: (_size_distance(model, grid.preset), abs(math.log(grid.num_steps / num_steps))),
    )
    found_advice = [
        Advice(f"the grid {grid.name}", point.bag_size, point.step_ratio, grid.baseline - point.final_loss)
        for point in sorted(grid.points, key=lambda point: point.final_loss)
    ]
    affordable = [advice for advice in found_advice if advice.data_ratio <= max_data_ratio]
    if not affordable:
        return []
    rank = "best of" if affordable[0] == found_advice[0] else "best for the available data of"
    best = dataclasses.replace(affordable[0], source=f"{rank} {affordable[0].source}")
    as_good = [advice for advice in affordable if advice.gain >= best.gain - NOISE_NATS]
    frugal = min(as_good, key=lambda advice: advice.data_ratio)
    found = [best]
    if frugal != affordable[0]:
        source = f"least data within {NOISE_NATS} nats of it"
        found.append(Advice(source, frugal.bag_size, frugal.step_ratio, frugal.gain))
    own = _own_setting(model, grid)
    return found + ([own] if own and own.data_ratio <= max_data_ratio else [])


def _own_setting(model: ModelSettings, grid: Grid) -> Advice | None:
    """Return the setting of the paper's run that is nearest in size, if its model is nearer than the grid's."""
    runs = published_runs()
    run = min(
        (run for run in runs if run.method == "tst"),
        key=lambda run: _size_distance(model, MODELS[run.model][0]),
    )
    preset = MODELS[run.model][0]
    if _size_distance(model, preset) >= _size_distance(model, grid.preset):
        return None
    ratio = round(run.superposition_steps / run.total_steps, 2)
    same = [other for other in runs if other.model == run.model and other.method == "baseline"]
    baseline = min(same, key=lambda other: abs(other.total_steps - run.total_steps))
    against = "" if baseline.total_steps == run.total_steps else f" against {baseline.total_steps} steps"
    return Advice(f"the paper's {run.model} run{against}", run.bag_size, ratio, baseline.final_loss - run.final_loss)


def _size_distance(model: ModelSettings, preset: str) -> float:
    other = ModelSettings(**PRESETS[preset])
    return abs(math.log(count_parameters(resolve_shape(model)) / count_parameters(resolve_shape(other))))
