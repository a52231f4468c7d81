"""A checkpoint's text files are read as text: an object in one of them is refused and never created."""

import contextlib
import pickle
from pathlib import Path

import pytest
import yaml

from megatron_tst.checkpoint.checksums import CHECKSUMS, read_checksums
from megatron_tst.checkpoint.folders import TRACKER, CheckpointFolders
from megatron_tst.checkpoint.run_state import CONFIG, RUN_STATE, read_run_state, read_saved_config
from megatron_tst.config import UserError

READERS = {
    RUN_STATE: read_run_state,
    CONFIG: read_saved_config,
    CHECKSUMS: read_checksums,
    TRACKER: lambda folder: CheckpointFolders(folder).latest(),
}


class Bomb:
    """Creates a directory when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.mkdir, (self.canary,)


@pytest.mark.parametrize("file", READERS)
@pytest.mark.parametrize("language", ["pickle", "YAML"])
def test_object_in_a_text_file_is_not_created(tmp_path: Path, file, language):
    canary = tmp_path / "executed"
    bomb = (
        pickle.dumps(Bomb(canary)) if language == "pickle" else f"!!python/object/apply:os.mkdir ['{canary}']".encode()
    )
    (tmp_path / file).write_bytes(bomb)
    # A tracker that names no step is ignored without an error.
    with pytest.raises(UserError) if file != TRACKER else contextlib.suppress(UserError):
        READERS[file](tmp_path)
    assert not canary.exists()
    # Negative control: the bomb goes off when it is unpickled.
    (pickle.loads if language == "pickle" else yaml.unsafe_load)((tmp_path / file).read_bytes())
    assert canary.exists()
