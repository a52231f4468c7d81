"""Reading and writing a checkpoint's tensors weight by weight."""

import contextlib
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_tst.config import UserError
from megatron_tst.conversion.torch_dist import Slice, StackedWeights, write_stacked
from tests.checkpoint.saved import change_contents

LAYERS, EXPERTS = 3, 2
WEIGHT = torch.randn(LAYERS, EXPERTS, 4, 5)


def write(folder, weight=WEIGHT, dtype=torch.float32):
    def piece(layer, expert):
        part = weight[layer, expert]
        return Slice("experts", (LAYERS, EXPERTS), (layer, expert), (4, 5), dtype, lambda: part)

    slices = [piece(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    slices.append(Slice("norm", (), (), (4,), torch.float32, lambda: torch.arange(4.0)))
    folder.mkdir(exist_ok=True)
    write_stacked(folder, slices, ["experts._extra_state/shard_0_1"], lambda _: None)
    return folder


def test_a_round_trip_preserves_the_weights(tmp_path):
    weights = StackedWeights(write(tmp_path))
    assert {key: tuple(entry.size) for key, entry in weights.entries.items()} == {
        "experts": (LAYERS, EXPERTS, 4, 5),
        "norm": (4,),
    }
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            assert torch.equal(weights.read("experts", (layer, expert)), WEIGHT[layer, expert])
        assert torch.equal(weights.read("experts", (layer,)), WEIGHT[layer])
    assert torch.equal(weights.read("norm", ()), torch.arange(4.0))


def test_torchs_own_loader_reads_our_files(tmp_path):
    write(tmp_path)
    state = {"experts": torch.zeros_like(WEIGHT), "norm": torch.zeros(4)}
    torch.distributed.checkpoint.load(state, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(state["experts"], WEIGHT) and torch.equal(state["norm"], torch.arange(4.0))


def test_only_the_chunks_of_the_weight_are_read(tmp_path, monkeypatch):
    weights = StackedWeights(write(tmp_path))
    read = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(load(*args, **kwargs)) or read[-1])
    weights.read("experts", (1, 1))
    assert [tuple(chunk.shape) for chunk in read] == [(1, 1, 4, 5)]
    assert torch.equal(read[0][0, 0], WEIGHT[1, 1])


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    pickle.loads(pickle.dumps(Trap()))
    (tmp_path / "executed").unlink()  # proves that the trap works
    folder = write(tmp_path / "checkpoint")
    change_contents(folder, lambda metadata: metadata.state_dict_metadata.update(trap=Trap()))
    with pytest.raises(UserError, match="which no checkpoint needs"):
        StackedWeights(folder)
    folder = write(tmp_path / "other")
    path = folder / "__0_0.distcp"
    size = path.stat().st_size
    torch.save({"trap": Trap()}, folder / "trap")
    blob = (folder / "trap").read_bytes()
    path.write_bytes(path.read_bytes() + blob)

    def point_at_trap(metadata):
        place = next(place for key, place in metadata.storage_data.items() if key.fqn == "norm")
        place.offset, place.length = size, len(blob)

    change_contents(folder, point_at_trap)
    with pytest.raises(UserError, match=r"norm\[\]: cannot be read"):
        StackedWeights(folder).read("norm", ())
    assert not (tmp_path / "executed").exists()


def test_damage_is_named(tmp_path):
    with pytest.raises(UserError, match=r"is not a checkpoint: \.metadata is missing"):
        StackedWeights(tmp_path)
    folder = write(tmp_path / "checkpoint")
    shard = folder / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"__0_0\.distcp: is truncated"):
        StackedWeights(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp: is missing"):
        StackedWeights(folder)
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match=r"experts\[0, 0\]: cannot be read"):
        StackedWeights(folder).read("experts", (0, 0))


def test_metadata_cannot_name_files_outside_the_folder(tmp_path):
    folder = write(tmp_path / "checkpoint")
    (folder / "__0_0.distcp").rename(tmp_path / "elsewhere")

    def point_up(metadata):
        for place in metadata.storage_data.values():
            place.relative_path = "../elsewhere"

    change_contents(folder, point_up)
    with pytest.raises(UserError, match=r"names \.\./elsewhere, which is outside the folder"):
        StackedWeights(folder)


def test_a_missing_chunk_is_named(tmp_path):
    folder = write(tmp_path)

    def forget_one(metadata):
        chunks = metadata.state_dict_metadata["experts"].chunks
        chunks[:] = [chunk for chunk in chunks if tuple(chunk.offsets[:2]) != (2, 0)]

    change_contents(folder, forget_one)
    weights = StackedWeights(folder)
    assert torch.equal(weights.read("experts", (2, 1)), WEIGHT[2, 1])
    with pytest.raises(UserError, match=r"experts\[2, 0\]: its chunks do not cover it"):
        weights.read("experts", (2, 0))


def test_a_chunk_may_span_several_layers(tmp_path):
    """Other writers of the format may store several layers in one chunk."""
    state = {"experts": WEIGHT}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    weights = StackedWeights(tmp_path)
    assert weights.entries["experts"].chunks == [ChunkStorageMetadata(torch.Size([0] * 4), WEIGHT.shape)]
    assert torch.equal(weights.read("experts", (2, 1)), WEIGHT[2, 1])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_the_cause_of_a_failed_write_is_raised(tmp_path, monkeypatch, stop):
    """torch's archive writer replaces every error inside it by its own error."""

    class Stopping(io.BufferedWriter):
        def write(self, data):
            if len(data) == 4 * WEIGHT[0, 0].numel():
                raise stop
            return super().write(data)

    @contextlib.contextmanager
    def create_stream(_, path, mode):
        with Stopping(io.FileIO(path, mode)) as stream:
            yield stream

    monkeypatch.setattr(FileSystem, "create_stream", create_stream)
    with pytest.raises(stop):
        write(tmp_path / "checkpoint")
