#!/usr/bin/env python3
"""Measure the speed of preprocessing and of the dataloader, the start of a large blend, and the time of data in a step.

    python benchmarks/data.py [--parts preprocess loader blend step] [--megatron-lm PATH] [--rounds 3] [--json FILE]

Both sides of each comparison alternate; figures are medians. All files are in a temporary folder and are read from the
operating system's cache.

preprocess  MB of JSON lines per second of CPU time, without the start (measured with one short document), on this
            machine's Python sources and documents. With --megatron-lm, a checkout of Megatron-LM, its own tool reads
            the same files with one worker; its dependencies, such as six, must be installed.
loader      data tokens/s of samples of 8192 x 16, compared with slices of the same documents from a memory map.
blend       time from 100 pairs of files to the first batch, compared with megatron-core's own builder of blends.
step        time of waiting for data in a short run with the quickstart's settings.
"""

import argparse
import filecmp
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Use one core: disable the threads of torch, tokenizers and fastokens.
ALONE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "FASTOKENS_BPE_THREADS": "1"}
SEQUENCE, BAG_SIZE, MICRO_BATCH = 8192, 16, 2
VOCABULARY = {"uint16": 4096, "int32": 128_256}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table with their keys as the header."""
    print(f"| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
    for row in rows:
        cells = (f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value:.0f}"
                 if isinstance(value, float) else str(value) for value in row.values())  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


def take_turns(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Call all functions alternately, after one warm-up call each, and return the median of each."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn, (name, way) in itertools.product(range(rounds + 1), ways.items()):
        value = way()
        if turn:
            found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


# ---- preprocess


def write_text(path: Path, num_bytes: float) -> None:
    """Write this Python's sources and documents as JSON lines of at most 10,000 characters, in a fixed order."""
    folders = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib")}
    files = {file for folder in folders for file in Path(folder).rglob("*") if file.suffix in {".py", ".rst", ".md"}}
    ordered = random.Random(1).sample(sorted(files), len(files))
    with path.open("w") as output:
        for file in ordered:
            text = file.read_text(encoding="utf-8", errors="ignore")
            for first in range(0, len(text), 10_000):
                output.write(json.dumps({"text": text[first : first + 10_000]}) + "\n")
            if output.tell() >= num_bytes:
                return


def train_tokenizers(text: Path, folder: Path) -> dict[str, Path]:
    """Learn the tokenizers for the comparison from every eighth document."""
    import tokenizers

    from megatron_tst.data.fast_encoder import SPLITS, split_bytes
    from megatron_tst.data.tokenizer import END_OF_DOCUMENT, train_bpe

    with text.open() as lines:
        documents = [json.loads(line)["text"] for line in itertools.islice(lines, 0, None, 8)]
    paths = {"BPE 4096": folder / "small", "BPE 32768, Llama 3's cut": folder / "large"}
    small, large = paths.values()
    train_bpe(documents, 4096, small / "tokenizer.json")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer, model.decoder = split_bytes(SPLITS["GPT-4, Llama 3"]), tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=32768, special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(documents, trainer)
    large.mkdir()
    model.save(str(large / "tokenizer.json"))
    # This setting has no effect, but fastokens is not known to support it; it shows the cost of other tokenizers.
    other = json.loads((small / "tokenizer.json").read_text())
    other["model"]["fuse_unk"] = True
    paths["BPE 4096, not known to fastokens"] = folder / "other"
    (folder / "other").mkdir()
    (folder / "other" / "tokenizer.json").write_text(json.dumps(other))
    for path in paths.values():
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_DOCUMENT}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return paths


def timed_command(command: list[str]) -> tuple[float, float]:
    """Run a command; return its wall-clock seconds and the CPU seconds of it and its child processes."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **ALONE})
        _, status, used = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            sys.exit(output.read().decode())
    return time.perf_counter() - start, used.ru_utime + used.ru_stime


def preprocess(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare both tools on the same file for each tokenizer."""
    text, line = folder / "text.jsonl", folder / "line.jsonl"
    write_text(text, arguments.megabytes * 1e6)
    line.write_text('{"text": "one"}\n')
    tools = {"ours": [str(ROOT / "tools/preprocess_data.py")]}
    if arguments.megatron_lm:
        theirs = arguments.megatron_lm / "tools/preprocess_data.py"
        tools = {"Megatron-LM": [str(theirs), "--tokenizer-type", "HuggingFaceTokenizer"], **tools}
    else:
        print("preprocess: without --megatron-lm, only our tool is measured")
    rows = []
    for name, tokenizer in train_tokenizers(text, folder).items():

        def run(tool: str, file: Path, tokenizer: Path = tokenizer) -> tuple[float, float]:
            command = [sys.executable, *tools[tool], "--input", str(file), "--output-prefix", str(folder / tool)]
            return timed_command([*command, "--tokenizer-model", str(tokenizer), "--append-eod", "--workers", "1"])

        row: dict[str, Any] = {"tokenizer": name}
        starts = take_turns({tool: lambda tool=tool: run(tool, line)[1] for tool in tools}, arguments.rounds)
        runs = [{tool: run(tool, text) for tool in tools} for _ in range(arguments.rounds)]
        speeds = [{tool: text.stat().st_size / 1e6 / (one[tool][1] - starts[tool]) for tool in tools} for one in runs]
        for tool in tools:
            row[f"{tool}, MB/s per core"] = statistics.median(speed[tool] for speed in speeds)
        if arguments.megatron_lm:
            row["ratio"] = statistics.median(speed["ours"] / speed["Megatron-LM"] for speed in speeds)
        for tool in tools:
            row[f"{tool}, start, s"] = starts[tool]
            row[f"{tool}, whole, s"] = statistics.median(one[tool][0] for one in runs)
        if arguments.megatron_lm:
            names = [f"_text_document{suffix}" for suffix in (".bin", ".idx")]
            pairs = [[folder / f"{tool}{name}" for tool in tools] for name in names]
            row["files"] = "equal" if all(filecmp.cmp(*pair, shallow=False) for pair in pairs) else "DIFFERENT"
        rows.append(row)
    return rows


# ---- loader


def write_corpus(prefix: Path, dtype: str, num_tokens: int, longest: int) -> None:
    """Write documents of random ids, from 200 tokens to the given maximum."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    drawn = numpy.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.dtype(dtype).type)
    while num_tokens > 0:
        document = drawn.integers(0, VOCABULARY[dtype], drawn.integers(200, longest), dtype=dtype)
        builder.add_document(document, [len(document)])
        num_tokens -= len(document)
    builder.finalize(f"{prefix}.idx")


def loader(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare reading samples with slicing the same documents out of a memory map."""
    return [compare_loader(folder, dtype, arguments.rounds) for dtype in VOCABULARY]


def compare_loader(folder: Path, dtype: str, rounds: int) -> dict[str, Any]:
    """Read the same samples by every method; return millions of data tokens/s."""
    import numpy

    from megatron_tst.config import DataSettings
    from megatron_tst.data.batches import BatchLoader
    from megatron_tst.data.build import SamplePlan, build_run_data
    from megatron_tst.data.samples import DatasetSpec, build_epoch
    from megatron_tst.superposition import Phase, Schedule

    tokenizer, ranks = small_run(folder)
    write_corpus(folder / dtype, dtype, 60_000_000, 2000)
    num_tokens, batches = SEQUENCE * BAG_SIZE, 100
    schedule = Schedule((Phase(BAG_SIZE, 2 * batches),))
    plan = SamplePlan(tokenizer, SEQUENCE, MICRO_BATCH, 1, folder / f"{dtype}-cache")
    text = build_run_data(DataSettings(data_path=(str(folder / dtype),), split="1,0,0"), schedule, 0, plan).train
    part = text.phases[0].parts[0]
    (share,) = plan.cache.glob("cut-*-phase0.npy")
    theirs_folder = folder / f"{dtype}-indices"
    theirs_folder.mkdir()
    spec = DatasetSpec("", num_tokens, (plan.seed, 0, 0), plan.cache)
    theirs = build_epoch(part._corpus, numpy.load(share), spec, 0, tokenizer, theirs_folder)
    mapped = numpy.memmap(folder / f"{dtype}.bin", dtype=dtype, mode="r")
    plain = numpy.asarray(mapped)
    count = 64
    slices = [sample_slices(part, index) for index in range(count)]

    def rate(read: Callable[[int], Any]) -> float:
        """Return the millions of data tokens that one method reads per second."""
        start = time.perf_counter()
        for index in range(count):
            read(index)
        return count * num_tokens / (time.perf_counter() - start) / 1e6

    def worker_rate() -> float:
        reader = BatchLoader(
            text, schedule, ranks, micro_batch_size=MICRO_BATCH, global_batch_size=MICRO_BATCH,
            vocab_size=VOCABULARY[dtype], num_workers=1,
        )  # fmt: skip
        next(reader._texts)
        start = time.perf_counter()
        for _ in range(batches):
            next(reader._texts)
        seconds = time.perf_counter() - start
        reader.close()
        return batches * MICRO_BATCH * num_tokens / seconds / 1e6

    rates = take_turns({
        "GPTDataset": lambda: rate(lambda index: theirs[index]),
        "a sample": lambda: rate(lambda index: text[(0, index)]),
        "one worker": worker_rate,
        "memmap": lambda: rate(lambda i: numpy.concatenate([mapped[a:b] for a, b in slices[i]], dtype=numpy.int64)),
        "array over memmap": lambda: rate(
            lambda i: numpy.concatenate([plain[a:b] for a, b in slices[i]], dtype=numpy.int64)
        ),
    }, rounds)  # fmt: skip
    pieces = f"{statistics.mean(map(len, slices)):.0f}"
    ratios = {f"{way} / memmap": rates[way] / rates["memmap"] for way in ("a sample", "one worker")}
    return {"stored": dtype, "documents per sample": pieces, **rates, **ratios}


def sample_slices(part: Any, index: int) -> list[tuple[int, int]]:
    """Return the offsets of the documents of a sample, from the indices that megatron-core wrote."""
    indices = part._epochs[0]
    place = int(indices.shuffle_index[index])
    (first, offset), (last, end) = indices.sample_index[place : place + 2].tolist()
    starts, ends = part._corpus.places(indices.document_index[first : last + 1])
    ends[-1], starts[0] = starts[-1] + end + 1, starts[0] + offset
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def small_run(folder: Path) -> tuple[Any, Any]:
    """Return a tokenizer and the parallel state of this process as a single rank."""
    import torch
    import torch.distributed as dist

    from megatron_tst.data.tokenizer import load_tokenizer, train_bpe
    from megatron_tst.distributed import ParallelSizes, destroy_parallel_state, init_parallel_state

    torch.set_num_threads(1)
    if dist.is_initialized():
        destroy_parallel_state()
    path = folder / "tokenizer.json"
    tokenizer = load_tokenizer(str(path)) if path.exists() else train_bpe(["text"], 257, path)
    return tokenizer, init_parallel_state(ParallelSizes())


# ---- blend


def blend(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the times from 100 pairs of files to the first batch of 8 samples."""
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from megatron_tst.config import DataSettings
    from megatron_tst.data.batches import BatchLoader, BatchShape
    from megatron_tst.data.build import SamplePlan, build_run_data
    from megatron_tst.superposition import Phase, Schedule

    tokenizer, ranks = small_run(folder)
    prefixes, weights = [str(folder / f"{number:03}") for number in range(100)], [1 + n % 7 for n in range(100)]
    for prefix in prefixes:
        write_corpus(Path(prefix), "uint16", 1_000_000, 1000)
    length, batch, split, steps = 1024, 8, "98,2,0", 300
    caches = (folder / f"cache{number}" for number in itertools.count())

    def ours(cache: Path, *phases: Phase) -> tuple[float, float]:
        start, schedule = time.perf_counter(), Schedule(phases)
        paths = tuple(itertools.chain.from_iterable(zip(map(str, weights), prefixes, strict=True)))
        plan = SamplePlan(tokenizer, length, batch, 1, cache)
        data = build_run_data(DataSettings(data_path=paths, split=split), schedule, 1, plan)
        built = time.perf_counter()
        reader = BatchLoader(
            data.train, schedule, ranks, micro_batch_size=batch, global_batch_size=batch, vocab_size=4096
        )
        bag_size = phases[0].bag_size
        reader.read(BatchShape(length, bag_size, torch.ones(bag_size) / bag_size))
        return built - start, time.perf_counter() - built

    def theirs(cache: Path) -> tuple[float, float]:
        start = time.perf_counter()
        config = GPTDatasetConfig(
            random_seed=1, sequence_length=length * BAG_SIZE, blend=(prefixes, weights), split=split,
            path_to_cache=str(cache), tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False,
            eod_mask_loss=False, create_attention_mask=False,
        )  # fmt: skip
        sizes = [steps * batch, batch, 0]
        train = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]
        built = time.perf_counter()
        torch.stack([train[index]["tokens"] for index in range(batch)])
        return built - start, time.perf_counter() - built

    ways: dict[str, Callable[[Path], tuple[float, float]]] = {
        "megatron-core's builder": theirs,
        "ours, one phase": lambda cache: ours(cache, Phase(BAG_SIZE, steps)),
        "ours, two phases": lambda cache: ours(cache, Phase(BAG_SIZE, steps), Phase(1, 2 * steps)),
    }
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for turn, (name, way) in itertools.product(range(arguments.rounds + 1), ways.items()):
        cache = next(caches)
        times = (*way(cache), *way(cache))
        if turn:
            found[name].append(times)
    columns = "no cache: indices, s", "first batch, s", "cached: indices, s", "first batch, s "
    return [
        {"100 files": name, **dict(zip(columns, map(statistics.median, zip(*runs, strict=True)), strict=True))}
        for name, runs in found.items()
    ]


# ---- step


def step(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train some steps with the quickstart's settings; the metric lines hold the time of waiting for data."""
    from megatron_tst.telemetry import read_metrics

    del arguments
    tokenizer, run = str(folder / "tokenizer.json"), folder / "run"
    library = sysconfig.get_paths()["stdlib"]
    timed_command([
        sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", library, "--tst-suffixes", ".py",
        "--tst-exclude", "site-packages", "--tst-shuffle-files", "1", "--output-prefix", str(folder / "stdlib"),
        "--tokenizer-model", tokenizer, "--tst-train-bpe", "512", "--append-eod",
    ])  # fmt: skip
    timed_command([
        sys.executable, str(ROOT / "pretrain_tst.py"), "--config", str(ROOT / "examples/quickstart/config.yaml"),
        "--tst-run-dir", str(run), "--data-path", str(folder / "stdlib_text_document"), "--tokenizer-model", tokenizer,
        "--train-iters", "200", "--lr-warmup-iters", "8", "--lr-wsd-decay-iters", "40", "--eval-interval", "200",
        "--log-interval", "10",
    ])  # fmt: skip
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "step_time_s" in line][1:]  # the steps of the first line are a warm-up
    rows = []
    for phase in sorted({line["phase"] for line in steps}):
        own = [line for line in steps if line["phase"] == phase]
        data_s, step_s = (statistics.median(line[key] for line in own) for key in ("data_time_s", "step_time_s"))
        share = statistics.median(line["data_time_s"] / line["step_time_s"] for line in own)
        rows.append(
            {
                "bag size": own[0]["bag_size"],
                "step, ms": step_s * 1e3,
                "text, ms": data_s * 1e3,
                "share, %": share * 100,
            }
        )
    return rows


PARTS = {"preprocess": preprocess, "loader": loader, "blend": blend, "step": step}


def main() -> None:
    """Measure the requested parts and print one table per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--megabytes", type=float, default=50, help="megabytes of JSON lines to preprocess")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.update(ALONE)
    results = {}
    for name in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = PARTS[name](Path(folder), arguments)
        print_table(results[name])
    if arguments.json:
        from megatron_tst.config import write_json

        arguments.json.write_text(write_json(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
