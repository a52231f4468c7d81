"""The preflight check of every node before the first step, which reports problems in seconds by the node's name."""

import logging
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tst.config import RunConfig, UserError
from megatron_tst.data.tokenizer import load_tokenizer
from megatron_tst.distributed import enter_device
from megatron_tst.distributed.device import driver_version
from megatron_tst.distributed.rendezvous import Rendezvous
from megatron_tst.megatron_patches import find_libraries
from megatron_tst.shape import resolve_shape
from megatron_tst.shape.parameters import checkpoint_bytes, count_parameters
from megatron_tst.telemetry import RunDirectory, start_log_screen

logger = logging.getLogger(__name__)

MAX_CLOCK_SKEW_S = 5.0
REDUCED_BYTES = {"cuda": 1 << 28, "cpu": 1 << 22}
# Items of a report that must be equal on every node.
_EQUAL = ("torch", "transformer_engine", "apex", "device", "driver")


def check_cluster(config: RunConfig) -> None:
    """Check every node of the job, and the network between them.

    Every rank calls it, before process groups are formed.

    Raises:
        UserError: on every rank, if there is a problem; the message names the nodes and their problems.
    """
    meeting = Rendezvous(config.parallel.preflight_timeout)
    if meeting.rank == 0:
        start_log_screen()
    reports = meeting.gather("nodes", _look_around(config, meeting.host))
    meeting.gather("clocks", None)
    clocks = meeting.gather("times", time.time())
    problems = [*_node_problems(reports), *_clock_problems(reports, clocks)]
    if problems:
        raise UserError(f"preflight: {'; '.join(problems)}")
    hosts = sorted({report["host"] for report in reports})
    if meeting.rank == 0:
        logger.info(
            "preflight: %d nodes, %d ranks, %s, Transformer Engine %s, clocks within %.1f s, data files of equal size, "
            "%.0f GB free for checkpoints", len(hosts), meeting.world_size, reports[0]["device"],
            reports[0]["transformer_engine"], max(clocks) - min(clocks),
            min(report["free_bytes"] for report in reports) / 1e9,
        )  # fmt: skip
    _check_network(config, meeting, [report["host"] for report in reports])


def _look_around(config: RunConfig, host: str) -> dict[str, Any]:
    """Return this rank's report on its node; ``wrong`` lists problems that prevent the run."""
    device, libraries = enter_device(), find_libraries()
    wrong = [*_data_problems(config)]
    run = RunDirectory(Path(config.logging.tst_run_dir or "."))
    saved = Path(config.checkpoint.save or run.checkpoints)
    free_bytes = 0
    try:
        saved.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=saved):
            free_bytes = shutil.disk_usage(saved).free
    except OSError as error:
        wrong.append(f"{saved} cannot be written: {error.strerror}")
    needed = 2 * _checkpoint_size(config)
    if free_bytes < needed and not wrong:
        wrong.append(f"{saved} has {free_bytes / 1e9:.1f} GB free, but two checkpoints need {needed / 1e9:.1f} GB")
    return {
        "host": host,
        "torch": torch.__version__,
        "transformer_engine": libraries.transformer_engine,
        "apex": libraries.apex,
        "device": device.name if device.backend == "nccl" else "CPU",
        "driver": driver_version() if device.backend == "nccl" else None,
        "sizes": dict(data_sizes(config)),
        "free_bytes": free_bytes,
        "wrong": wrong,
    }


def _checkpoint_size(config: RunConfig) -> int:
    model = config.model
    vocab = model.vocab_size or load_tokenizer(config.data.tokenizer_model or "").vocab_size
    shape = resolve_shape(model, vocab, config.parallel)
    return checkpoint_bytes(count_parameters(shape), config.training.bf16)


def _prefixes(config: RunConfig) -> list[str]:
    data = config.data
    names = (*data.data_path, *data.train_data_path, *data.valid_data_path)
    return [name for name in names if not name.replace(".", "", 1).isdigit()]


def data_sizes(config: RunConfig) -> Iterator[tuple[str, int]]:
    """Yield each data file that this node sees, with its size in bytes."""
    for prefix in _prefixes(config):
        for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
            if path.is_file():
                yield str(path), path.stat().st_size


def _data_problems(config: RunConfig) -> Iterator[str]:
    for prefix in _prefixes(config):
        for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
            try:
                with path.open("rb") as file:
                    file.read(1)
            except OSError as error:
                yield f"{path} cannot be read: {error.strerror}"


def _node_problems(reports: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the problems of single nodes and the differences of nodes from the majority."""
    for host, wrong in dict.fromkeys((report["host"], text) for report in reports for text in report["wrong"]):
        yield f"{host}: {wrong}"
    ranks_per_host = Counter(report["host"] for report in reports)
    yield from _odd_ones({host: f"{count} ranks" for host, count in ranks_per_host.items()}, "runs")
    for fact in _EQUAL:
        yield from _odd_ones({report["host"]: str(report[fact]) for report in reports}, f"has {fact}")
    for path in sorted({path for report in reports for path in report["sizes"]}):
        sizes = {report["host"]: f"{report['sizes'].get(path, 0)} bytes" for report in reports}
        yield from _odd_ones(sizes, f"has {path} with")


def _odd_ones(values: dict[str, str], words: str) -> Iterator[str]:
    usual, _ = Counter(values.values()).most_common(1)[0]
    for host, value in values.items():
        if value != usual:
            yield f"{host} {words} {value}, but most nodes have {usual}"


def _clock_problems(reports: list[dict[str, Any]], clocks: list[float]) -> Iterator[str]:
    middle = sorted(clocks)[len(clocks) // 2]
    off = {report["host"]: clock - middle for report, clock in zip(reports, clocks, strict=True)}
    for host, seconds in off.items():
        if abs(seconds) > MAX_CLOCK_SKEW_S:
            yield f"{host}: its clock differs from the median by {seconds:+.0f} s"


def _check_network(config: RunConfig, meeting: Rendezvous, hosts: list[str]) -> None:
    """All-reduce within each node, then across all nodes, and name the nodes that failed or were too slow.

    Raises:
        UserError: on every rank, if an all-reduce failed or was too slow.
    """
    if meeting.world_size == 1:
        return
    device = enter_device()
    timeout = timedelta(seconds=config.parallel.preflight_timeout)
    store = dist.PrefixStore("groups", meeting.store)
    dist.init_process_group(
        device.backend, store=store, rank=meeting.rank, world_size=meeting.world_size, timeout=timeout
    )
    ranks_of = defaultdict(list)
    for rank, host in enumerate(hosts):
        ranks_of[host].append(rank)
    groups: dict[str, Any] = {host: dist.new_group(ranks) for host, ranks in ranks_of.items()}
    floor = config.parallel.preflight_min_gb_per_s
    for name, group in (("within the node", groups[hosts[meeting.rank]]), ("between nodes", dist.group.WORLD)):
        is_alone = dist.get_world_size(group) == 1
        outcome = float("inf") if is_alone else all_reduce_speed(group, device.torch_device, timeout)
        outcomes = dict(zip(hosts, meeting.gather(name, outcome), strict=True))
        failed = [f"{host}: {result}" for host, result in outcomes.items() if isinstance(result, str)]
        slow = [f"{host}: {speed:.1f} GB/s" for host, speed in outcomes.items() if not failed and speed < floor]
        if failed or slow:
            raise UserError(f"preflight: all-reduce {name}: {'; '.join(failed or slow)} (minimum {floor:g} GB/s)")
        if meeting.rank == 0 and min(outcomes.values()) < float("inf"):
            logger.info("preflight: all-reduce %s: lowest bandwidth %.1f GB/s", name, min(outcomes.values()))
    dist.destroy_process_group()


def all_reduce_speed(group: Any, device: torch.device, timeout: timedelta) -> float | str:
    """Return the bus bandwidth of an all-reduce in GB/s, the median of five, or the message of an error."""
    size = dist.get_world_size(group)
    buffer = torch.ones(REDUCED_BYTES[device.type] // 4, device=device)
    times = []
    try:
        for _ in range(6):
            start = time.perf_counter()
            dist.all_reduce(buffer, group=group, async_op=True).wait(timeout)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    # The first all-reduce sets up connections and is left out. Each byte crosses the slowest link 2 (n - 1) / n times.
    return 2 * (size - 1) / size * buffer.nbytes / sorted(times[1:])[2] / 1e9
