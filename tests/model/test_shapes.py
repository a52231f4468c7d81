"""The published shapes, built on torch's meta device, where parameters take no memory."""

import pytest
import torch

from megatron_tst.config import PRESETS, ModelSettings, ParallelSettings, TrainingSettings
from megatron_tst.megatron_patches import find_libraries
from megatron_tst.model import LossChoice, build_gpt, transformer_config
from megatron_tst.shape import resolve_shape

# Parameter counts, computed by hand from the shapes in the docstring of megatron_tst/config/presets.py.
PARAMETERS = {
    "270m": 2 * 128256 * 576 + 30 * (576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536 + 2 * 576) + 576,
    "600m": 2 * 128256 * 960 + 32 * (960 * (960 + 2 * 320) + 960 * 960 + 3 * 960 * 2560 + 2 * 960) + 960,
    "3b": 2 * 128256 * 2048 + 36 * (2048 * (2048 + 2 * 512) + 2048**2 + 3 * 2048 * 11008 + 2 * 2048) + 2048,
    "10b-a1b": 2 * 151936 * 1536
    + 32 * (1536 * (3072 + 2 * 512) + 3072 * 1536 + 2 * 128 + 128 * 3 * 1536 * 512 + 1536 * 128 + 2 * 1536)
    + 1536,
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_have_the_expected_number_of_parameters(rank, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    model = ModelSettings(**PRESETS[name])
    shape = resolve_shape(model)
    config = transformer_config(model, shape, TrainingSettings(), ParallelSettings(), find_libraries())
    config.perform_initialization = False
    with torch.device("meta"):
        gpt = build_gpt(config, model, shape, LossChoice(), use_transformer_engine=False)
    assert sum(parameter.numel() for parameter in gpt.parameters()) == PARAMETERS[name]


def test_the_moe_preset_has_the_papers_ten_and_a_half_billion_parameters():
    assert round(PARAMETERS["10b-a1b"] / 1e9, 1) == 10.5
