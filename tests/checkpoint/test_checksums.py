"""Checksums are readable by coreutils and detect every kind of damage."""

import subprocess
from pathlib import Path

import pytest

from megatron_tst.checkpoint.checksums import CHECKSUMS, find_damage, find_damage_alone, write_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "__0_0.distcp").write_bytes(bytes(range(256)) * 100)
    (tmp_path / ".metadata").write_bytes(b"table of contents")
    write_checksums(tmp_path, {})
    return tmp_path


def test_sha256sum_reads_the_checksums(folder: Path):
    done = subprocess.run(["sha256sum", "--check", CHECKSUMS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == [".metadata:", "OK", "OK", "__0_0.distcp:"]


def test_intact_directory_has_no_damage(rank, folder: Path):
    assert find_damage(folder, rank) is None


def test_progress_adds_up_to_all_bytes(folder: Path):
    told: list[int] = []
    assert find_damage_alone(folder, on_progress=told.append) is None
    assert sum(told) == sum(path.stat().st_size for path in folder.iterdir() if path.name != CHECKSUMS)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit": (flip_a_bit, "is damaged"),
    "a truncated file": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "is damaged"),
    "a missing file": (Path.unlink, "cannot be read: No such file"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", CHECKSUMS])
def test_damage_is_found_and_named(rank, folder: Path, name, file):
    damage, words = DAMAGES[name]
    damage(folder / file)
    found = find_damage(folder, rank)
    assert found is not None
    assert (words in found and file in found) or CHECKSUMS in found
