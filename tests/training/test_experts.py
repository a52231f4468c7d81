"""The experts' load and the dropped choices, compared with the routers' own logits."""

from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_tst.telemetry import read_metrics
from megatron_tst.training import train
from tests.training.runs import arguments, build_here

MOE = "--num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 2 --train-iters 3 --eval-iters 0"


def train_watched(argv):
    """Train; return the run and every router's choices in training, ``[positions, experts]`` bool."""
    run = build_here(argv)
    choices = []

    def watch(router, arguments_, _):
        logits = router.gating(arguments_[0]).view(-1, 4)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.topk(2, dim=1).indices, True)
        choices.append((router.layer_number - 1, chosen))

    for chunk in run.stepper.train_state.chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(watch)
    train(run)
    return run, choices


def expected(choices, capacity):
    """Return, per layer, the busiest and idlest expert over the mean and the dropped fraction, counted one by one."""
    found = []
    for layer in (0, 1):
        taken, chosen = [0] * 4, 0
        for number, map_PE in choices:
            if number == layer:
                for expert in range(4):
                    wanted = int(map_PE[:, expert].sum())
                    chosen += wanted
                    taken[expert] += min(wanted, capacity)
        mean = sum(taken) / 4
        found.append((max(taken) / mean, min(taken) / mean, 1 - sum(taken) / chosen))
    return found


# 2 sequences of 16 positions, 2 experts per position: a balanced load is 16, a capacity factor of 0.5 leaves 8.
CASES = {"": 10**9, "--moe-expert-capacity-factor 0.5": 8, "--moe-expert-capacity-factor 1.25": 20}


@pytest.mark.parametrize("policy", ["position", "probs"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("extra", CASES)
def test_load_and_drops_match_the_routers_choices(here, corpus, tokenizer, tmp_path: Path, extra, dispatcher, policy):
    flags = f"{MOE} --moe-token-dispatcher-type {dispatcher} --moe-token-drop-policy {policy} {extra}"
    run, choices = train_watched(arguments(corpus, str(tokenizer.path), tmp_path / "run", flags))
    lines = [line for line in read_metrics(run.directory.metrics) if "dropped_share" in line]
    per_line = len(choices) // 3
    for number, line in enumerate(lines):
        wanted = expected(choices[number * per_line : (number + 1) * per_line], CASES[extra])
        got = list(zip(line["expert_load_max"], line["expert_load_min"], line["dropped_share"], strict=True))
        assert got == [pytest.approx(layer) for layer in wanted]
    dropped = [share for line in lines for share in line["dropped_share"]]
    # The capacity is half of the balanced load, so at least half of the choices are dropped.
    assert min(dropped) >= 0.5 if "0.5" in extra else max(dropped) < 0.5
    assert max(dropped) == 0 if not extra else max(dropped) > 0
