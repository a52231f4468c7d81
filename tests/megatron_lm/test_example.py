"""The example trains with both trainers and reports that their losses agree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.megatron_lm.trainers import needs_trainer
from tests.training.runs import ROOT


@needs_trainer
@pytest.mark.distributed
def test_the_example_compares_both_trainers(tmp_path: Path):
    script = (ROOT / "examples/megatron_lm/run.sh").read_text()
    assert script.count("bash tools/setup_venv.sh\n") == 1
    # The environment of the tests replaces the one that the script would set up.
    here = script.replace("bash tools/setup_venv.sh\n", "").replace('cd "$(dirname "$0")/../.."', f"cd {ROOT}")
    environment = {
        "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "VENV": str(Path(sys.prefix)), "STEPS": "10",
        "DATA": str(tmp_path / "data"), "RUNS": str(tmp_path / "runs"),
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", here], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    apart = re.findall(r"^(loss|valid_loss): (\d+) values, at most (\S+) apart", done.stdout, re.MULTILINE)
    assert [(name, int(count)) for name, count, _ in apart] == [("loss", 10), ("valid_loss", 1)]
    assert all(float(largest) < 5e-6 for _, _, largest in apart)
