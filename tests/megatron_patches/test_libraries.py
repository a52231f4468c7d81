"""The libraries that a run reports, with and without Transformer Engine and apex, and those megatron-core uses."""

import importlib.metadata
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tst.config import ModelSettings, ParallelSettings, TrainingSettings
from megatron_tst.megatron_patches import Libraries, find_libraries
from megatron_tst.model import LossChoice, build, transformer_config
from megatron_tst.shape import resolve_shape
from tests.model.small import DENSE, VOCAB
from tests.training.runs import start

NOTHING = "layers: megatron-core; norms and attention: torch; cross-entropy: native; "


def describe_found(monkeypatch, *names: str) -> str:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)
    monkeypatch.setattr(importlib.metadata, "version", {"transformer_engine": "2.9.0"}.__getitem__)
    libraries = find_libraries()
    return libraries.describe(cross_entropy="native" if libraries.transformer_engine is None else "te")


@pytest.mark.parametrize(
    ("found", "wanted"),
    {
        "": f"{NOTHING}Adam: torch; gradient accumulation: not fused",
        "fused_weight_gradient_mlp_cuda": f"{NOTHING}Adam: torch; gradient accumulation: not fused",
        "apex": f"{NOTHING}Adam: apex; gradient accumulation: not fused",
        "apex fused_weight_gradient_mlp_cuda": f"{NOTHING}Adam: apex; gradient accumulation: fused, apex",
        "transformer_engine apex fused_weight_gradient_mlp_cuda": (
            "layers: Transformer Engine 2.9.0; norms and attention: Transformer Engine; "
            "cross-entropy: Transformer Engine; Adam: Transformer Engine; gradient accumulation: fused, apex"
        ),
        "transformer_engine": (
            "layers: Transformer Engine 2.9.0; norms and attention: Transformer Engine; "
            "cross-entropy: Transformer Engine; Adam: Transformer Engine; gradient accumulation: not fused"
        ),
    }.items(),
)
def test_library_of_each_part_is_named(monkeypatch, found: str, wanted: str):
    assert describe_found(monkeypatch, *found.split()) == wanted


SHAPE = resolve_shape(ModelSettings(**DENSE), VOCAB)


def config_with(libraries: Libraries):
    return transformer_config(ModelSettings(**DENSE), SHAPE, TrainingSettings(), ParallelSettings(), libraries)


def test_transformer_engine_alone_does_not_fuse_gradient_accumulation(monkeypatch):
    monkeypatch.setattr(build, "TransformerConfig", dict)
    te = Libraries(transformer_engine="2.9.0")
    assert config_with(te)["apply_rope_fusion"]
    assert not config_with(te)["gradient_accumulation_fusion"]
    assert config_with(replace(te, apex=True, gradient_accumulation_fusion=True))["gradient_accumulation_fusion"]


def test_output_layer_refuses_the_fusion_without_the_extension(rank):
    config = config_with(Libraries(gradient_accumulation_fusion=True))
    with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
        build.build_gpt(config, ModelSettings(**DENSE), SHAPE, LossChoice(), use_transformer_engine=False)


BROKEN = "raise RuntimeError('imported')"
APEX = {
    "apex/__init__.py": "",
    "apex/optimizers.py": "class FusedAdam: ...\nclass FusedSGD: ...",
    "apex/multi_tensor_apply.py": "multi_tensor_applier = None",
}
EXTENSIONS = {
    "amp_C.py": "multi_tensor_l2norm = multi_tensor_scale = None",
    "fused_weight_gradient_mlp_cuda.py": "",
}
PROBE = """
import json, torch
torch.cuda.is_available = lambda: {has_cuda}
import megatron_tst
from megatron.core import optimizer
from megatron_tst.megatron_patches import find_libraries
found = find_libraries()
print(json.dumps([optimizer.Adam.__module__.split(".")[0], found.adam, found.gradient_accumulation_fusion]))
"""


@pytest.mark.parametrize(
    ("has_cuda", "files", "wanted"),
    [
        (True, {**APEX, **EXTENSIONS}, ["apex", "apex", True]),
        # apex built without its extensions; the PyPI package of that name looks the same.
        (True, APEX, ["torch", "torch", False]),
        (False, {"apex.py": BROKEN, "transformer_engine.py": BROKEN, **EXTENSIONS}, ["torch", "torch", False]),
    ],
    ids=["apex", "apex without extensions", "no CUDA"],
)
def test_megatron_core_uses_the_reported_libraries(tmp_path: Path, has_cuda, files, wanted):
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    done = start("-c", PROBE.format(has_cuda=has_cuda), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted
