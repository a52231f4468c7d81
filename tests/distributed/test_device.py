import pytest
import torch

from megatron_tst.distributed.device import visible_gpus


@pytest.mark.parametrize(
    ("environment", "count", "expected"),
    [(None, 0, []), (None, 2, ["0", "1"]), ("3,GPU-a", 2, ["3", "GPU-a"]), ("", 0, []), ("-1", 0, [])],
)
def test_gpus_have_their_names_in_the_environment(monkeypatch, environment, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if environment is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environment)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert visible_gpus() == expected
