"""Transformer Engine's own Python code without a GPU: the checkpoints of its layers, and its compiled kernels.

Each version is imported in a separate process. tests/run.sh fetches the wheels.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from megatron_tst.megatron_patches.versions import accepted_transformer_engine
from tests.training.runs import start

WHEELS = Path(os.environ.get("TST_TE_WHEELS", "nowhere"))
VERSIONS = sorted((path for path in WHEELS.glob("*/")), key=lambda path: Version(path.name))
WITH_LAYERS = [path for path in VERSIONS if path.name in accepted_transformer_engine()]

pytestmark = [
    pytest.mark.te_kernels,
    pytest.mark.skipif(not VERSIONS, reason="needs unpacked wheels in TST_TE_WHEELS"),
]


def oldest_and_newest(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, id=path.name) for path in dict.fromkeys([*paths[:1], *paths[-1:]])]


@functools.cache
def printed_by(module: str, *argv: str, **env: str) -> Any:
    # Triton compiles nothing if its interpreter is enabled.
    done = start("-m", module, *argv, TRITON_INTERPRET="0", **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("folder", oldest_and_newest(WITH_LAYERS))
def test_its_layers_have_the_checkpoints_and_gradient_reductions_of_our_layers(folder: Path):
    wanted = printed_by("tests.model.te_layers")
    found = printed_by("tests.model.te_layers", str(folder))
    assert len(wanted) == 5
    for name, parts in wanted.items():
        for part in parts:
            assert found[name][part] == wanted[name][part], (name, part)
    checkpoint = wanted["3b"]["last"]["checkpoint"]
    weight = "decoder.layers.self_attention.linear_proj.weight torch.bfloat16"
    assert f"{weight} (2048, 512) at (3, 0, 1536) of (4, 2048, 2048)" in checkpoint["tensors"]
    assert checkpoint["others"] == ["_extra_state"]
    assert "torch.bfloat16 experts" in wanted["small"]["last"]["gradients"]


KERNELS = {
    1: {
        "2.9.0": ["online_softmax_kernel", "cross_entropy_kernel", "element_mul_kernel"],
        "2.20.2": ["cross_entropy_forward_kernel", "cross_entropy_backward_kernel"],
    },
    2: {
        "2.9.0": ["online_softmax_kernel", "cross_entropy_kernel", "element_mul_kernel"],
        "2.20.2": ["cross_entropy_tp_pre_kernel", "cross_entropy_tp_post_kernel", "cross_entropy_backward_kernel"],
    },
}


@pytest.mark.parametrize("folder", oldest_and_newest(VERSIONS))
def test_its_kernels_compile_for_hopper_and_blackwell(tmp_path: Path, folder: Path):
    compiled = printed_by("tests.model.te_compiled", str(folder), TRITON_CACHE_DIR=str(tmp_path))
    assert all(each["is_elf"] for each in compiled)
    for ranks in (1, 2):
        for logits in ("torch.bfloat16", "torch.float32"):
            for capability, target in ((90, "sm_90a"), (100, "sm_100a")):
                case = {"capability": capability, "logits": logits, "ranks": ranks}
                made = [each for each in compiled if case.items() <= each.items()]
                assert [each["kernel"] for each in made] == KERNELS[ranks][folder.name]
                assert {each["target"] for each in made} == {target}
