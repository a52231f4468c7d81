"""Our writer, compared with the library's reader, and our reader, compared with the library's writer."""

import json

import pytest
import torch

from megatron_tst.config import UserError
from megatron_tst.conversion.safetensors_files import SafetensorsFolder, Weight, write_shards

safetensors = pytest.importorskip("safetensors", reason="the extra hf is not installed")
pytest.importorskip("safetensors.torch")

TENSORS = {
    "b": torch.randn(7, 3),
    "a": torch.randn(5).bfloat16(),  # 10 bytes, so the next weight is not aligned
    "c": torch.randn(4, 2).half(),
    "d": torch.randn(3, 3, 3, dtype=torch.float64).transpose(0, 2),
}
WEIGHTS = [Weight(name, tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()]


def write(folder, max_shard_bytes, tensors=TENSORS):
    written = []
    write_shards(folder, WEIGHTS, iter(tensors.values()), max_shard_bytes, written.append)
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(("max_shard_bytes", "files"), [(10**6, 1), (100, 3), (94, 3), (1, 4)])
def test_the_library_reads_our_files(tmp_path, max_shard_bytes, files):
    write(tmp_path, max_shard_bytes)
    paths = sorted(tmp_path.glob("*.safetensors"))
    found = {name: tensor for path in paths for name, tensor in safetensors.torch.load_file(path).items()}
    assert found.keys() == TENSORS.keys() and len(paths) == files
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    if files == 1:
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        return
    assert [path.name for path in paths] == [f"model-{n:05}-of-{files:05}.safetensors" for n in range(1, files + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    for path in paths:
        held = safetensors.torch.load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == held.keys()
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= max_shard_bytes


def test_a_weight_out_of_order_is_refused(tmp_path):
    swapped = dict(zip(TENSORS, reversed(TENSORS.values()), strict=True))
    with pytest.raises(AssertionError, match="b"):
        write(tmp_path, 10**6, swapped)


@pytest.mark.parametrize("shards", [1, 3])
def test_our_reader_reads_the_librarys_files(tmp_path, shards):
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    if shards == 1:
        safetensors.torch.save_file(contiguous, tmp_path / "model.safetensors")
    else:
        write(tmp_path, 100)
    folder = SafetensorsFolder(tmp_path)
    assert sorted(folder.weights) == sorted(TENSORS)
    for weight in WEIGHTS:
        assert folder.weights[weight.name] == weight
        assert torch.equal(folder.read(weight.name), TENSORS[weight.name])


def test_damaged_folders_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        SafetensorsFolder(tmp_path)
    write(tmp_path, 100)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors: cannot be read as safetensors"):
        SafetensorsFolder(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors: is missing"):
        SafetensorsFolder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(UserError, match=r"elsewhere\.safetensors: is missing"):
        SafetensorsFolder(tmp_path)
    index.write_text('{"weight_map": []}')
    with pytest.raises(UserError, match="cannot be read as an index"):
        SafetensorsFolder(tmp_path)


def test_integer_tensors_are_refused(tmp_path):
    safetensors.torch.save_file({"steps": torch.ones(2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="steps: type I64 cannot be converted"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": 5}, r"index\.json: c: 5 is not the name of a file"),
        ({"x": "model-00001-of-00003.safetensors"}, r"00001-of-00003\.safetensors: does not hold x, although"),
        ({"c": "model-00001-of-00003.safetensors"}, r"00001-of-00003\.safetensors: does not hold c, although"),
        ({"a": None}, r"holds a, but \S+ names no file for it"),
    ],
)
def test_an_index_that_disagrees_with_the_files_is_refused(tmp_path, change, message):
    write(tmp_path, 100)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places = {**index["weight_map"], **change}
    path.write_text(json.dumps({"weight_map": {name: file for name, file in places.items() if file is not None}}))
    with pytest.raises(UserError, match=message):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_refused_by_name(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"holds pickled weights \({name}\)"):
        SafetensorsFolder(tmp_path)
