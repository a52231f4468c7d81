"""The Dockerfile built for the CPU and for a stand-in of NVIDIA's image, and what then lies and runs in the images."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.docker.builder import Builder, install

pytestmark = pytest.mark.docker
ROOT = Path(__file__).parents[2]
CPU, GPU = "python:3.11-slim", re.findall(r"^ARG BASE_IMAGE=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0]
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
    """This checkout, with files in it that must stay out of an image and one that need not."""
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
    """A container of the CPU image."""
    arguments = ("--build-arg", f"BASE_IMAGE={CPU}", "--build-arg", "IMAGE_VERSION=v1-test")
    builder.build(context, "tst:cpu", "--layers", *arguments)
    return builder.start("tst:cpu")


def versions(text: str) -> dict[str, str]:
    """Packages of a pip list or of constraints, those for other versions of Python than Debian's left out."""
    found = [Requirement(line) for line in text.splitlines() if "==" in line and not line.startswith(("#", "-e"))]
    here = [line for line in found if line.marker is None or line.marker.evaluate({"python_version": "3.11"})]
    return {line.name: str(line.specifier).removeprefix("==") for line in here}


PINS = versions((ROOT / "constraints.txt").read_text())


def test_two_builds_have_the_same_packages(builder: Builder, context: Path, cpu: str):
    builder.build(context, "tst:again", "--no-cache", "--build-arg", f"BASE_IMAGE={CPU}")
    first, second = (builder.run(box, ["cat", "versions.txt"]) for box in (cpu, builder.start("tst:again")))
    assert first == second
    installed = {name: version.partition("+")[0] for name, version in versions(first).items()}
    # Debian brings three packages; every other one is pinned.
    unpinned = {"megatron-tst", "pip", "setuptools", "wheel"}
    assert installed.keys() >= {"torch", "megatron-core", *unpinned}
    assert {name: version for name, version in installed.items() if PINS.get(name) != version}.keys() == unpinned


def test_new_source_leaves_the_dependencies_cached(builder: Builder, context: Path, cpu: str):
    (context / "README.md").write_text("another")
    output = builder.build(context, "tst:changed", "--layers", "--build-arg", f"BASE_IMAGE={CPU}")
    cached = re.findall(r"^STEP \d+/\d+: (.*)\n--> Using cache", output, re.MULTILINE)
    assert any("setup_image.sh" in step for step in cached) and "COPY --chown=tst . ." not in cached


def test_the_image_holds_the_checkout_and_no_more(builder: Builder, cpu: str):
    assert builder.run(cpu, ["id", "-u"]).strip() == "10001"
    planted = builder.run(cpu, ["grep", "-rlx", "planted", "."]).split()
    assert planted == ["./docs/planted.md"]


def test_tests_and_quickstart_run_as_they_are_and_install_nothing(builder: Builder, cpu: str):
    script = "PIP_NO_INDEX=1 bash tests/run.sh tests/docs tests/platform tests/superposition -k 'not quickstart_runs'"
    assert re.search(r"\d+ passed", builder.run(cpu, ["sh", "-c", script]))
    assert "tst ends" in builder.run(cpu, ["sh", "-c", "PIP_NO_INDEX=1 STEPS=40 bash examples/quickstart/run.sh"])
    recorded = json.loads(builder.run(cpu, ["cat", "runs/quickstart-seed1/tst/versions.json"]))
    assert recorded["image"] == "v1-test"


STAND_IN = r"""
set -e
site=/usr/local/lib/python3.11/dist-packages
pip install --quiet --break-system-packages --root-user-action ignore torch==2.13.0 numpy==1.26.4 packaging==24.1
sed -i 's/^Version: .*/Version: 2.13.0a0+base.nv/' $site/torch-*.dist-info/METADATA
mv $site/torch-*.dist-info $site/torch-2.13.0a0+base.nv.dist-info
for library in transformer_engine-2.9.0+base apex-0.1; do
  name=${library%%-*}
  mkdir $site/$name $site/$library.dist-info
  echo 'raise RuntimeError("not without CUDA")' >$site/$name/__init__.py
  printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' $name ${library#*-} >$site/$library.dist-info/METADATA
done
mkdir -p /etc/pip
echo packaging==24.1 >/etc/pip/constraint.txt
"""


def test_what_the_base_image_compiled_stays(builder: Builder, context: Path):
    """The base stands in for NVIDIA's: a torch of no index, an older numpy, TE and apex, all packages constrained."""
    base = builder.start(CPU)
    builder.run(base, ["sh", "-c", STAND_IN], *builder.mounts)
    builder.buildah("config", "--env", "PIP_CONSTRAINT=/etc/pip/constraint.txt", base)
    builder.commit(base, GPU)
    builder.build(context, "tst:gpu", "--layers")
    box = builder.start("tst:gpu")
    installed = versions(builder.run(box, ["cat", "versions.txt"]))
    assert installed["torch"] == "2.13.0a0+base.nv" and installed["numpy"] == "1.26.4"
    assert installed["transformer_engine"] == "2.9.0+base" and installed["apex"] == "0.1"
    # megatron-core needs 24.2.
    assert installed["packaging"] == PINS["packaging"] != "24.1"
    own = builder.run(box, ["sh", "-c", "ls .venv/lib/python3.*/site-packages"]).split()
    assert "megatron" in own and not {"torch", "numpy", "triton", "apex", "transformer_engine"} & set(own)
    tests = ["python", "-m", "pytest", "-q", "tests/data", "tests/training/test_step.py"]
    assert re.search(r"\d+ passed", builder.run(box, tests))
    # The base's torchrun, with the image's interpreter.
    command = ["torchrun", "--nproc-per-node", "1", "tools/check_environment.py"]
    recorded = json.loads(builder.run(box, command))
    assert recorded["transformer-engine"] == "2.9.0+base" and recorded["megatron-core"] == "0.16.1"
