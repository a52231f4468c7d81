"""The parts of tests/gpu/run.sh, which run on a GPU, or as far as possible on the CPU together with all other tests."""

import pytest
import torch

from megatron_tst.distributed import enter_device
from tests.gpu.report import PARTS, ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]):
    files = {ROOT / part.path for part in PARTS}
    for item in items:
        if item.path in files:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return enter_device().torch_device


@pytest.fixture
def cuda(device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(params=[False, True], ids=["ordinary", "deterministic"])
def mode(request) -> bool:
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)
