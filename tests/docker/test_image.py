"""Builds the Dockerfile for the CPU and for stand-ins of NVIDIA's images, and checks the contents of the images."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.docker.builder import Builder, find_python, install

pytestmark = pytest.mark.docker
ROOT = Path(__file__).parents[2]
CPU, CUDA = "python:3.11-slim", "localhost/python3.12-torch"
# Debian's Python 3.11 has megatron-core 0.16.1.
ON_CPU = ("--build-arg", f"BASE_IMAGE={CPU}", "--build-arg", "MEGATRON_CORE=0.16.1")
IGNORED = (".git/config", ".venv/pyvenv.cfg", "runs/a/metrics.jsonl", "data/corpus.bin", "megatron_tst/.env")


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    reason = install()
    if reason is not None:
        pytest.skip(reason)
    builder = Builder(tmp_path_factory.mktemp("builder"))
    builder.debian(CPU)
    yield builder
    builder.remove()


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Path:
    """A copy of this checkout with files that must not be in an image and one that may be."""
    folder = tmp_path_factory.mktemp("context")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in (*IGNORED, "docs/planted.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("planted")
    return folder


@pytest.fixture(scope="module")
def cpu(builder: Builder, context: Path) -> str:
    """The name of a container of the CPU image."""
    builder.build(context, "tst:cpu", "--layers", *ON_CPU, "--build-arg", "IMAGE_VERSION=v1-test")
    return builder.start("tst:cpu")


def versions(text: str, python: str = "3.11") -> dict[str, str]:
    """Return the packages of a pip list or of constraints, without those for other versions of Python."""
    found = [Requirement(line) for line in text.splitlines() if "==" in line and not line.startswith(("#", "-e"))]
    here = [line for line in found if line.marker is None or line.marker.evaluate({"python_version": python})]
    return {line.name: str(line.specifier).removeprefix("==") for line in here}


PINS = versions((ROOT / "constraints.txt").read_text())


def test_two_builds_have_the_same_packages(builder: Builder, context: Path, cpu: str):
    builder.build(context, "tst:again", "--no-cache", *ON_CPU)
    first, second = (builder.run(box, ["cat", "versions.txt"]) for box in (cpu, builder.start("tst:again")))
    assert first == second
    installed = {name: version.partition("+")[0] for name, version in versions(first).items()}
    # Three packages are Debian's; all others are pinned.
    unpinned = {"megatron-tst", "pip", "setuptools", "wheel"}
    assert installed.keys() >= {"torch", "megatron-core", *unpinned}
    assert {name: version for name, version in installed.items() if PINS.get(name) != version}.keys() == unpinned


def test_a_source_change_keeps_the_dependencies_cached(builder: Builder, context: Path, cpu: str):
    (context / "README.md").write_text("another")
    output = builder.build(context, "tst:changed", "--layers", *ON_CPU)
    cached = re.findall(r"^STEP \d+/\d+: (.*)\n--> Using cache", output, re.MULTILINE)
    assert any("setup_image.sh" in step for step in cached) and "COPY --chown=tst . ." not in cached


def test_the_image_holds_only_the_checkout(builder: Builder, cpu: str):
    assert builder.run(cpu, ["id", "-u"]).strip() == "10001"
    planted = builder.run(cpu, ["grep", "-rlx", "planted", "."]).split()
    assert planted == ["./docs/planted.md"]


def test_tests_and_quickstart_run_and_install_nothing(builder: Builder, cpu: str):
    tests = "tests/docs/test_documents.py tests/megatron_patches/test_cpu.py tests/superposition"
    script = f"PIP_NO_INDEX=1 bash tests/run.sh {tests}"
    assert re.search(r"\d+ passed", builder.run(cpu, ["sh", "-c", script]))
    assert "tst ends" in builder.run(
        cpu, ["sh", "-c", "PIP_NO_INDEX=1 STEPS=50 PACKAGES=networkx bash examples/quickstart/run.sh"]
    )
    recorded = json.loads(builder.run(cpu, ["cat", "runs/quickstart-seed1/tst/versions.json"]))
    assert recorded["image"] == "v1-test"


@dataclass(frozen=True)
class Base:
    """A stand-in for one of NVIDIA's images: its tag, its relevant packages, and the matching megatron-core."""

    tag: str
    core: str
    arguments: tuple[str, ...]
    torch: str
    numpy: str
    transformer_engine: str
    # Result of importing Transformer Engine without a driver.
    te_source: str
    te_imported: str


NEW_TAG = re.findall(r"^ARG BASE_IMAGE=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0]
OLD_TAG = "nvcr.io/nvidia/pytorch:25.11-py3"
BASES = {
    "26.06": Base(
        NEW_TAG,
        core="0.19.2",
        arguments=(),
        torch="2.14.1a0+base.nv26.6.54250401",
        numpy="2.1.0",
        transformer_engine="2.16.0+4220403e",
        te_source="import ctypes; ctypes.CDLL('libcuda.so.1')",
        te_imported="not tried, for want of a driver",
    ),
    "25.11": Base(
        OLD_TAG,
        core="0.16.1",
        arguments=("--build-arg", f"BASE_IMAGE={OLD_TAG}", "--build-arg", "MEGATRON_CORE=0.16.1"),
        torch="2.14.1a0+base.nv25.11",
        numpy="1.26.4",
        transformer_engine="2.9.0+70f53666",
        te_source="",
        te_imported="imported",
    ),
}
STAND_IN = r"""
set -e
site=/usr/local/lib/python3.12/site-packages
python3 -m pip install --quiet --root-user-action ignore numpy==$NUMPY packaging==24.1
sed -i "s/^Version: .*/Version: $TORCH/" $site/torch-*.dist-info/METADATA
mv $site/torch-*.dist-info $site/torch-$TORCH.dist-info
for library in transformer_engine-$TE apex-0.1; do
  name=${library%%-*}
  mkdir $site/$name $site/$library.dist-info
  printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' $name ${library#*-} >$site/$library.dist-info/METADATA
done
echo "$TE_SOURCE" >$site/transformer_engine/__init__.py
touch $site/transformer_engine/pytorch.py
echo 'raise RuntimeError("not without CUDA")' >$site/apex/__init__.py
echo 'import sys; assert "torch" in sys.modules' | tee $site/amp_C.py >$site/fused_weight_gradient_mlp_cuda.py
mkdir -p /etc/pip
echo packaging==24.1 >/etc/pip/constraint.txt
"""


@pytest.fixture(scope="module")
def cuda(builder: Builder) -> str:
    """An image with Python 3.12, as in NVIDIA's images, and torch's CUDA build, which also runs on the CPU."""
    python = find_python("python3.12")
    if python is None:
        pytest.skip("needs Python 3.12, as python3.12 or from pyenv, in a folder of its own")
    box = builder.start(CPU)
    builder.add_python(box, python)
    pip = ("python3", "-m", "pip", "install", "--quiet", "--no-cache-dir", "--root-user-action", "ignore")
    builder.run(box, [*pip, "torch==2.14.1"], *builder.mounts)
    builder.commit(box, CUDA)
    return CUDA


@pytest.mark.long
@pytest.mark.parametrize("name", BASES)
def test_compiled_packages_of_the_base_image_are_kept(builder: Builder, context: Path, cuda: str, name: str):
    """The stand-in has a torch that no index offers, an older numpy, TE and apex, and constrains all packages."""
    base = BASES[name]
    box = builder.start(cuda)
    settings = {
        "TORCH": base.torch,
        "NUMPY": base.numpy,
        "TE": base.transformer_engine,
        "TE_SOURCE": base.te_source,
    }
    env = [f"--env={setting}={value}" for setting, value in settings.items()]
    builder.run(box, ["sh", "-c", STAND_IN], *env, *builder.mounts)
    builder.buildah("config", "--env", "PIP_CONSTRAINT=/etc/pip/constraint.txt", box)
    builder.commit(box, base.tag)
    builder.build(context, f"tst:{name}", "--layers", *base.arguments)
    box = builder.start(f"tst:{name}")
    installed, pins = (
        versions(text, "3.12")
        for text in (builder.run(box, ["cat", "versions.txt"]), (ROOT / "constraints.txt").read_text())
    )
    assert installed["torch"] == base.torch and installed["numpy"] == base.numpy
    assert installed["transformer_engine"] == base.transformer_engine and installed["apex"] == "0.1"
    # megatron-core needs 24.2.
    assert installed["packaging"] == pins["packaging"] != "24.1"
    own = builder.run(box, ["sh", "-c", "ls .venv/lib/python3.*/site-packages"]).split()
    assert "megatron" in own and not {"torch", "numpy", "triton", "apex", "transformer_engine"} & set(own)
    tests = ["python", "-m", "pytest", "-q", "tests/data/test_samples.py", "tests/training/test_step.py"]
    assert re.search(r"\d+ passed", builder.run(box, tests))
    # The base's torchrun must use the image's interpreter.
    command = ["torchrun", "--nproc-per-node", "1", "tools/check_environment.py"]
    recorded = json.loads(builder.run(box, command))
    assert recorded["transformer-engine"] == base.transformer_engine and recorded["megatron-core"] == base.core
    imported = recorded["imported"]
    assert imported.pop("transformer_engine.pytorch").startswith(base.te_imported)
    assert imported == {"amp_C": "imported", "fused_weight_gradient_mlp_cuda": "imported"}
