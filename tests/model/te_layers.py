"""Describe the checkpoint contents of single ranks for the models of all presets, without a GPU and without memory.

``python -m tests.model.te_layers FOLDER`` builds the models from Transformer Engine's layers, whose Python code is in
the unpacked wheel in FOLDER; without a folder it builds them from megatron-core's own layers. The compiled libraries
that Transformer Engine would load are replaced by :class:`CompiledLibrary`. The tensors are on torch's meta device, and
the other ranks do not exist. The descriptions are printed as JSON.
"""

import importlib.util
import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

MIXTURE = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 4,
}
# Each tensor-parallel size divides the number of query groups; models with experts also use expert parallelism.
PARALLEL = {
    "270m": {"tensor_model_parallel_size": 3, "pipeline_model_parallel_size": 2},
    "600m": {"tensor_model_parallel_size": 5, "pipeline_model_parallel_size": 2},
    "3b": {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
    "10b-a1b": MIXTURE,
    "small": MIXTURE,
}
VOCAB = 64


class Compiled(type):
    """A name in a compiled library: a function or class that is never called, or an enumeration with any members."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, cls.__members__.setdefault(name, len(cls.__members__)))
        return cls.__members__[name]

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"{cls.__name__} of a compiled library was called")


class CompiledLibrary(types.ModuleType):
    """A module that contains every name."""

    def __getattr__(self, name: str) -> Compiled:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, Compiled(name, (), {"__members__": {}}))
        return getattr(self, name)


def make_importable(folder: Path) -> None:
    """Import the wheel's ``transformer_engine`` before megatron_tst, which hides it if there is no GPU."""
    # The last two stand for Python packages that an installation includes but that building a model does not use.
    for name in ("transformer_engine_torch", "transformer_engine.pytorch.onnx_extensions", "einops"):
        sys.modules[name] = CompiledLibrary(name)
    # This is the only function that is called; it returns version 9.14.0.
    sys.modules["transformer_engine_torch"].get_cudnn_version = lambda: 91400
    sys.path.insert(0, str(folder))
    # With Transformer Engine's own switch for its build, no library is loaded.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    source = folder / "transformer_engine" / "common" / "__init__.py"
    spec = importlib.util.spec_from_file_location("transformer_engine.common", source)
    common = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch

    # A regular import would have set this attribute.
    transformer_engine.common = common


def join_as(rank: int, world_size: int, sizes: Any) -> Any:
    """Join a world in which no other rank exists and nothing is communicated."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_tst.distributed import init_parallel_state

    init, new_group = dist.init_process_group, dist.new_group
    world = {"store": FakeStore(), "rank": rank, "world_size": world_size}
    with (
        mock.patch.object(dist, "init_process_group", lambda *_, **__: init("fake", **world)),
        mock.patch.object(dist, "new_group", lambda *args, **named: new_group(*args, **{**named, "backend": "fake"})),
        mock.patch.dict(os.environ, WORLD_SIZE=str(world_size)),
    ):
        return init_parallel_state(sizes)


def describe_checkpoint(chunk: Any) -> Any:
    """List each tensor with its dtype and its place in the global tensor, and the names of all other entries."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = chunk.sharded_state_dict()
    apply_factories(state)
    tensors, others = [], set()
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor):
            place = f"{entry.local_shape} at {entry.global_offset} of {entry.global_shape}"
            tensors.append(f"{entry.key} {entry.dtype} {place}")
        else:
            others.add(entry.key.rsplit(".", 1)[-1])
    return {"tensors": sorted(tensors), "others": sorted(others)}


def describe_gradients(chunk: Any) -> dict[str, int]:
    """Count the parameters of each dtype by the ranks over which their gradients are summed."""
    sizes: dict[str, int] = {}
    for parameter in chunk.parameters():
        kind = f"{parameter.dtype} " + ("shared" if getattr(parameter, "allreduce", True) else "experts")
        if getattr(parameter, "sequence_parallel", False):
            kind += " sequence_parallel"
        sizes[kind] = sizes.get(kind, 0) + parameter.numel()
    return sizes


def describe_model(shape: dict[str, Any], device: str, rank: int, world_size: int, sizes: dict[str, int]) -> Any:
    """Build one rank's part of a model of four layers as a run does, and describe it."""
    import torch

    from megatron_tst.config import ModelSettings, ParallelSettings, RunConfig, TrainingSettings
    from megatron_tst.distributed import ParallelSizes, destroy_parallel_state, seed_everything
    from megatron_tst.megatron_patches import find_libraries
    from megatron_tst.model import build_model
    from megatron_tst.shape import resolve_shape

    ranks = join_as(rank, world_size, ParallelSizes(**sizes))
    seed_everything(1)
    model = replace(ModelSettings(**shape), num_layers=4)
    parallel = ParallelSettings(**sizes, sequence_parallel=world_size > 1)
    run = RunConfig(model=model, parallel=parallel, training=TrainingSettings(bf16=True))
    with (
        # Transformer Engine's modules ask for a GPU and its compute capability.
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device(device)),
        torch.device(device),
    ):
        (chunk,) = build_model(run, resolve_shape(model, model.vocab_size or VOCAB, parallel), ranks, find_libraries())
        described = {"checkpoint": describe_checkpoint(chunk.module)}
        if device == "cpu":
            # On the meta device, parameters lose these attributes when they are moved.
            described["gradients"] = describe_gradients(chunk)
        # Loading passes None for an extra state that a checkpoint of other layers lacks.
        for module in chunk.modules():
            if type(module).set_extra_state is not torch.nn.Module.set_extra_state:
                module.set_extra_state(None)
    destroy_parallel_state()
    return described


def main(folder: str | None = None) -> None:
    """Print the descriptions of a single rank, and of the first and the last of many ranks."""
    if folder is not None:
        make_importable(Path(folder))
    from megatron_tst.config import PRESETS
    from tests.model.small import MOE

    models = {name: (shape, "meta") for name, shape in PRESETS.items()}
    models["small"] = ({**MOE, "moe_grouped_gemm": True}, "cpu")
    descriptions = {}
    for name, (shape, device) in models.items():
        sizes = PARALLEL[name]
        # The data-parallel size is two. The experts are distributed over tensor- and data-parallel ranks.
        world_size = 2 * sizes["tensor_model_parallel_size"] * sizes["pipeline_model_parallel_size"]
        descriptions[name] = {
            "alone": describe_model(shape, device, 0, 1, {}),
            "first": describe_model(shape, device, 0, world_size, sizes),
            "last": describe_model(shape, device, world_size - 1, world_size, sizes),
        }
    print(json.dumps(descriptions))


if __name__ == "__main__":
    main(*sys.argv[1:])
