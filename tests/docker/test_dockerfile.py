"""The Dockerfile and the files around it, checked without building anything."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: it comes with the extra test")
def test_hadolint_finds_nothing(tmp_path: Path):
    def lint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([HADOLINT, dockerfile], capture_output=True, text=True)

    assert lint(ROOT / "Dockerfile").stdout == ""
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.replace("FROM ${BASE_IMAGE}", "FROM python:latest"))
    assert "DL3007" in lint(tmp_path / "Dockerfile").stdout


def test_the_base_image_is_an_argument_with_a_fixed_version():
    assert re.findall(r"^FROM (.*)", DOCKERFILE, re.MULTILINE) == ["${BASE_IMAGE}"]
    assert re.search(r"^ARG BASE_IMAGE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", DOCKERFILE, re.MULTILINE)
    assert re.search(r"^ARG MEGATRON_CORE=\d+\.\d+\.\d+$", DOCKERFILE, re.MULTILINE)


def test_the_last_user_is_not_root():
    users = re.findall(r"^USER (.*)", DOCKERFILE, re.MULTILINE)
    assert users and int(users[-1]) > 0


def test_dependencies_are_installed_before_the_source_is_copied():
    assert DOCKERFILE.index("setup_image.sh plot") < DOCKERFILE.index("COPY --chown=tst . .")


def test_no_file_requires_pypis_apex():
    wanted = "\n".join((ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt"))
    asks = re.compile(r"""["']apex|^apex|pip install.* apex""", re.MULTILINE)
    assert not asks.search(wanted) and not asks.search(DOCKERFILE + (ROOT / "tools/setup_image.sh").read_text())
    assert all(asks.search(line) for line in ('gpu = ["apex"]', "apex==0.9", "pip install --quiet apex"))


def test_files_that_git_ignores_are_not_in_the_build_context():
    ignored = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line]
    # "/runs/" is a folder at the root, which Docker writes as "runs"; "x/" is any folder of that name.
    wanted = [line.strip("/") if line.startswith("/") else f"**/{line.rstrip('/')}" for line in ignored]
    excluded = (ROOT / ".dockerignore").read_text().splitlines()
    assert [line for line in wanted if line not in excluded] == []
    assert ".git" in excluded
