"""A grid of runs over bag size, step ratio and bag weights, and what its ends show."""

import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from megatron_tst.config import EXIT_CODE, RunConfig, UserError, dump_config, load_config, parse_config
from megatron_tst.telemetry import RunDirectory
from megatron_tst.telemetry.compare import Estimate
from megatron_tst.telemetry.curves import is_decayed, read_curve

# What is said of a run that waited when all was stopped.
NOT_STARTED = "not started"


@dataclass(frozen=True, order=True)
class SweepPoint:
    """One setting of the grid; the baseline has bag size 1 and step ratio 0."""

    bag_weights: str
    step_ratio: float
    bag_size: int


@dataclass(frozen=True)
class SweepRun:
    """One run of the grid.

    Attributes:
        point: its setting.
        seed: of weights and data order.
        directory: of the run.
        config: all its settings.
        argv: that make them.
    """

    point: SweepPoint
    seed: int
    directory: RunDirectory
    config: RunConfig
    argv: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its directory."""
        return self.directory.path.name

    @property
    def is_complete(self) -> bool:
        """Whether it has ended.

        Raises:
            UserError: if another run is in its directory.
        """
        directory = self.directory
        if not directory.config.is_file():
            return False
        if directory.config.read_text(encoding="utf-8") != dump_config(self.config):
            raise UserError(f"{directory.path}: holds a run with other settings; choose another --output")
        try:
            read_curve(directory.path)
        except UserError:  # not evaluated at its end
            return False
        return True


def plan_sweep(
    bag_sizes: Sequence[int],
    step_ratios: Sequence[float],
    bag_weights: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    flags: Sequence[str],
) -> list[SweepRun]:
    """Return the runs of a grid, the baseline first, all seeds of a setting together.

    Args:
        bag_sizes: s, above 1.
        step_ratios: r, above 0.
        bag_weights: of the loss.
        seeds: of each setting.
        output: folder of the run directories.
        flags: of pretrain_tst.py, the same for all runs.

    Raises:
        UserError: if a value lies outside the grid, or makes no run with the flags.
    """
    for flag, values in (
        ("bag-sizes", bag_sizes), ("step-ratios", step_ratios), ("bag-weights", bag_weights), ("seeds", seeds)
    ):  # fmt: skip
        if len(set(values)) < len(values):
            raise UserError(f"--{flag} {' '.join(map(str, values))}: names a value twice")
    for size in bag_sizes:
        if size < 2:
            raise UserError(f"--bag-sizes {size}: must be above 1; the baseline, bag size 1, is always run")
    for ratio in step_ratios:
        if not 0 < ratio <= 1:
            raise UserError(f"--step-ratios {ratio}: must lie between 0 and 1")
    points = [SweepPoint("uniform", 0.0, 1)]
    points += [SweepPoint(w, r, s) for w in bag_weights for r in step_ratios for s in bag_sizes]
    return [_plan_run(point, seed, output, flags) for point in points for seed in seeds]


def _plan_run(point: SweepPoint, seed: int, output: Path, flags: Sequence[str]) -> SweepRun:
    weights = "" if point.bag_weights == "uniform" else f"-{point.bag_weights}"
    kind = "baseline" if point.bag_size == 1 else f"s{point.bag_size}-r{point.step_ratio:g}{weights}"
    folder = output / f"{kind}-seed{seed}"
    # Whether it starts or goes on, the command is the same.
    own = {
        "bag-size": point.bag_size, "step-ratio": point.step_ratio, "bag-weights": point.bag_weights, "run-dir": folder,
    }  # fmt: skip
    argv = [*flags, *(text for name, value in own.items() for text in (f"--tst-{name}", str(value)))]
    argv += ["--seed", str(seed), "--load", str(RunDirectory(folder).checkpoints)]
    config = parse_config(argv)
    if point.bag_size > 1 and all(phase.bag_size == 1 for phase in config.schedule.phases):
        raise UserError(f"--step-ratios {point.step_ratio:g}: is less than one of {config.schedule.num_steps} steps")
    if not is_decayed(config):
        raise UserError(
            f"--lr-decay-iters {config.optimizer.lr_decay_iters}: is more than the runs' {config.schedule.num_steps} "
            "steps; a grid compares losses after the decay"
        )
    if not config.training.eval_iters:
        raise UserError("--eval-iters 0: a grid compares validation losses")
    return SweepRun(point, seed, RunDirectory(folder), config, tuple(argv))


class Runner:
    """Runs pretrain_tst.py as processes, a number at a time, each with a GPU of its own where there are any."""

    def __init__(self, program: Path, workers: int, gpus: Sequence[str]) -> None:
        """Prepare.

        Args:
            program: pretrain_tst.py.
            workers: runs at a time.
            gpus: for CUDA_VISIBLE_DEVICES; empty for the CPU, whose cores the runs share.
        """
        self._program, self.workers = program, workers
        self._slots: queue.Queue[dict[str, str]] = queue.Queue()
        share = str(max((os.cpu_count() or 1) // workers, 1))
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share)}
        for slot in range(workers):
            self._slots.put({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else threads)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._is_stopped = False

    @property
    def running(self) -> list[str]:
        """Names of the runs under way."""
        return list(self._processes)

    def run_all(self, runs: Sequence[SweepRun]) -> Iterator[tuple[SweepRun, str | None]]:
        """Yield each run at its end, with what went wrong, or None.

        After a user's mistake no other run is started. On an interruption, runs under way are told to save and stop,
        and waited for.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(self._run, run): run for run in runs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                self._is_stopped = True
                for process in list(self._processes.values()):
                    process.terminate()

    def _run(self, run: SweepRun) -> str | None:
        slot = self._slots.get()
        try:
            if self._is_stopped:
                return NOT_STARTED
            log = run.directory.path.with_name(f"{run.name}.out")
            with log.open("wb") as file:
                command = (sys.executable, str(self._program), *run.argv)
                environment = {**os.environ, **slot}
                # In a session of its own: what is typed at the terminal reaches this process alone.
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
                self._processes[run.name] = process
                if self._is_stopped:
                    process.terminate()
                code = process.wait()
            self._is_stopped |= code == EXIT_CODE
            last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            return None if code == 0 else f"exit code {code}: {last} ({log})"
        finally:
            self._processes.pop(run.name, None)
            self._slots.put(slot)


@dataclass(frozen=True)
class SweepResult:
    """How a run of a grid ended.

    Attributes:
        name: of the run directory.
        point: its setting.
        seed: of the run.
        rest: all else that runs of a grid have in common.
        superposition: what its superposed runs have in common too.
        final_loss: next-token validation loss, nats per token.
        data_tokens: read.
        gpu_hours: of training.
    """

    name: str
    point: SweepPoint
    seed: int
    rest: str
    superposition: str
    final_loss: float
    data_tokens: int
    gpu_hours: float


def read_result(path: Path) -> SweepResult:
    """Read a finished run's directory.

    Raises:
        UserError: if it holds no finished run, or one with more than a superposed and an ordinary phase.
    """
    curve, config = read_curve(path), load_config(RunDirectory(path).config)
    phases = config.schedule.phases
    superposed = [phase for phase in phases if phase.bag_size > 1]
    if len(superposed) > 1 or len(phases) - len(superposed) > 1:
        raise UserError(f"{path}: has {len(phases)} phases; a grid has a superposed and an ordinary one")
    ratio = round(sum(phase.num_steps for phase in superposed) / config.schedule.num_steps, 3)
    weights = config.superposition.loss_weights if superposed else "uniform"
    point = SweepPoint(weights, ratio, superposed[0].bag_size if superposed else 1)
    optimizer = config.optimizer
    decay = optimizer.lr_warmup_iters, optimizer.lr_decay_iters, optimizer.lr_wsd_decay_iters
    return SweepResult(
        name=path.name,
        point=point,
        seed=curve.seed,
        rest=repr((curve.setting, curve.num_steps, decay)),
        superposition=repr(([phase.reads_bags for phase in superposed], config.superposition.tst_objective)),
        final_loss=curve.final_loss,
        data_tokens=int(curve.total("data_tokens")),
        gpu_hours=curve.total("gpu_hours"),
    )


def losses_by_point(results: Sequence[SweepResult]) -> Mapping[SweepPoint, Estimate]:
    """Return the final loss of each setting over its seeds, the baseline's first.

    Raises:
        UserError: if the runs are not of one grid, or one of them is there twice.
    """
    found: dict[SweepPoint, dict[int, SweepResult]] = {}
    superposed = [result for result in results if result.point.bag_size > 1]
    for result in sorted(results, key=lambda result: (result.point.bag_size > 1, result.point, result.seed)):
        if result.rest != results[0].rest:
            raise UserError(f"{result.name}: differs from {results[0].name} in more than a grid does")
        if result.point.bag_size > 1 and result.superposition != superposed[0].superposition:
            raise UserError(
                f"{result.name}: superposes otherwise than {superposed[0].name}: another objective or input"
            )
        twin = found.setdefault(result.point, {}).setdefault(result.seed, result)
        if twin is not result:
            raise UserError(f"{result.name}: has the setting and seed of {twin.name}")
    return {point: Estimate.of([run.final_loss for run in runs.values()]) for point, runs in found.items()}
