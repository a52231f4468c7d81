"""The interpreter and the folder that the commands of a checkout use."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
HERE = "{}.{}".format(*sys.version_info)


def bash(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def another_version(tmp_path: Path) -> Path:
    """A virtual environment whose Python reports version 3.7."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 3.7\n")
    python.chmod(0o755)
    return tmp_path / "venv"


def test_an_environment_of_another_python_is_not_changed(another_version: Path):
    done = bash("bash tools/setup_venv.sh", VENV=str(another_version), PYTHON=sys.executable)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"{another_version} holds Python 3.7, but PYTHON={sys.executable} is {HERE}: set VENV to another folder"
    )
    assert [path.name for path in another_version.rglob("*")] == ["bin", "python"]


def test_the_environment_of_an_image_is_not_changed(another_version: Path):
    (another_version / "final").touch()
    done = bash("bash tools/setup_venv.sh", VENV=str(another_version), PYTHON=sys.executable)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_gpu_extra_is_refused_with_a_link_to_the_image(tmp_path: Path):
    done = bash("bash tools/setup_venv.sh plot,gpu", VENV=str(tmp_path / "venv"))
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "docs/docker.md" in line and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("venv", "wanted"), [("", ROOT / ".venv"), (".venv-3.12", ROOT / ".venv-3.12"), ("/opt/v", Path("/opt/v"))]
)
def test_ranks_run_in_the_chosen_environment(venv: str, wanted: Path):
    done = bash("unset PYTHON; source launch/env.sh; echo $PYTHON", VENV=venv, CONTAINER_IMAGE="")
    assert done.stdout.strip() == str(wanted / "bin" / "python")


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_ignores_every_environment():
    done = bash("git check-ignore .venv-3.12/pyvenv.cfg .venv-x/pyvenv.cfg")
    assert done.stdout.split() == [".venv-3.12/pyvenv.cfg", ".venv-x/pyvenv.cfg"]


@pytest.mark.parametrize(("python", "torch", "core"), [("3.11", "2.13.0", "0.16.1"), ("3.12", "2.14.1", "0.19.2")])
def test_each_python_has_its_pins(python: str, torch: str, core: str):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    chosen = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert len({pin.name for pin in chosen}) == len(chosen)
    versions = {pin.name: str(pin.specifier) for pin in chosen}
    assert (versions["torch"], versions["megatron-core"]) == (f"=={torch}", f"=={core}")


ACCEPTED = {"3.11": {"0.16.1"}, "3.12": {"0.16.1", "0.19.2"}}


@pytest.mark.parametrize("python", ACCEPTED)
def test_untested_versions_of_megatron_core_are_excluded(python: str):
    lines = [line.strip().strip('",') for line in (ROOT / "pyproject.toml").read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line.startswith("megatron-core")]
    (here,) = [requirement for requirement in wanted if requirement.marker.evaluate({"python_version": python})]
    known = (
        "0.16.0",
        "0.16.1",
        "0.17.0",
        "0.17.1",
        "0.18.0",
        "0.18.2",
        "0.19.0",
        "0.19.1",
        "0.19.2",
        "0.19.3",
        "0.20.0",
    )
    assert set(here.specifier.filter(known)) == ACCEPTED[python]
