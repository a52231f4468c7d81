"""The negative control of superposition, which re-initializes only embedding and output layer at the switch."""

from pathlib import Path

import pytest
import torch

from megatron_tst.distributed import seed_everything
from megatron_tst.training import loop
from megatron_tst.training.reinitialize import EMBEDDING, OUTPUT, reinitialize
from megatron_tst.training.run import Run
from tests.training.runs import arguments, build_here, parameters, train_here
from tests.training.test_resume import assert_same_run, curve

CONTROL = "--tst-reinitialize-at-switch"
# Dropout uses the RNG state; the switch is after step 4 of 8.
RUN = "--tst-bag-size 4 --tst-steps 4 --attention-dropout 0.1 --hidden-dropout 0.1"


@pytest.fixture(params=["", "--bf16", "--bf16 --use-distributed-optimizer", "--use-distributed-optimizer"])
def kind(request):
    return request.param


@pytest.fixture
def argv(corpus, tokenizer, tmp_path: Path):
    def build(name: str, extra: str = "", load: str | None = None) -> list[str]:
        load = f"--load {tmp_path / load / 'checkpoints'}" if load else ""
        return arguments(corpus, str(tokenizer.path), tmp_path / name, f"{RUN} {extra} {load}")

    return build


def is_vocabulary(name: str) -> bool:
    return name.endswith((EMBEDDING, OUTPUT))


def adam_states(run) -> dict[str, dict[str, torch.Tensor]]:
    """Return main weights, moments and step count by parameter name; the ranks of these tests hold all of them."""
    found = {}
    for part in run.stepper.train_state.optimizer.chained_optimizers:
        for name, parameter in run.stepper.train_state.chunks[0].named_parameters():
            main = getattr(parameter, "main_param", parameter)
            if hasattr(part, "model_param_group_index_map"):
                group, place = part.model_param_group_index_map[parameter]
                main = part.optimizer.param_groups[group]["params"][place]
            state = part.optimizer.state[main]
            found[name] = {key: value.clone().view(-1) for key, value in {"main": main.detach(), **state}.items()}
    return found


def test_the_vocabulary_is_redrawn_and_all_else_unchanged(here, argv, kind):
    train_here(argv("run", f"{kind} {CONTROL} --exit-interval 4"))
    run = build_here(argv("run", f"{kind} {CONTROL}", load="run"))
    seed_everything(run.config.training.seed)
    generator = torch.get_rng_state()
    weights, states = parameters(run), adam_states(run)
    reinitialize(run.stepper.train_state, seed=1234, step=4)
    assert torch.equal(torch.get_rng_state(), generator)
    new_weights, new_states = parameters(run), adam_states(run)
    drawn = [name for name in weights if is_vocabulary(name)]
    assert len(drawn) == 2 < len(weights)
    for name, weight in new_weights.items():
        state, before = new_states[name], states[name]
        assert state.keys() == before.keys() == {"main", "step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(state["step"], torch.tensor([4.0]))
        assert before["exp_avg"].any() and before["exp_avg_sq"].any()
        if name not in drawn:
            assert torch.equal(weight, weights[name])
            assert all(torch.equal(state[key], before[key]) for key in state)
            continue
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()
        assert torch.equal(state["main"], weight.float().view(-1))
        # 300 x 32 draws: the standard error of the mean is std / 98, that of the deviation std / 139.
        assert weight.shape == (300, 32)
        assert abs(weight.float().mean()) < 5 * 0.02 / 98
        assert weight.float().std() == pytest.approx(0.02, abs=5 * 0.02 / 139)
        assert abs(torch.corrcoef(torch.stack((weight.flatten(), weights[name].flatten())).float())[0, 1]) < 0.1
    both = torch.stack([new_weights[name].flatten().float() for name in drawn])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.1
    run.directory.leave()


def test_the_draw_differs_from_every_earlier_draw(here, argv):
    """The draw differs from the initial weights and from the draws of other steps and seeds."""
    run = build_here(argv("run", CONTROL))
    draws = [parameters(run)]
    for seed, step in ((1234, 4), (1234, 5), (1235, 4)):
        reinitialize(run.stepper.train_state, seed, step)
        draws.append(parameters(run))
    for name in filter(is_vocabulary, draws[0]):
        found = torch.stack([weights[name].flatten() for weights in draws])
        assert (torch.corrcoef(found) - torch.eye(4)).abs().max() < 0.1
    run.directory.leave()


def test_tied_weights_are_drawn_once(here, corpus, tokenizer, tmp_path: Path):
    tied = [flag for flag in arguments(corpus, str(tokenizer.path), tmp_path / "run", f"{RUN} {CONTROL}")
            if flag != "--untie-embeddings-and-output-weights"]  # fmt: skip
    run = build_here(tied)
    assert [name for name in parameters(run) if is_vocabulary(name)] == [f"module.{EMBEDDING}"]
    before = parameters(run)
    reinitialize(run.stepper.train_state, 1234, 4)
    changed = [name for name, weight in parameters(run).items() if not torch.equal(weight, before[name])]
    assert changed == [f"module.{EMBEDDING}"]
    run.directory.leave()


@pytest.mark.parametrize("stop", [4, 5], ids=["at the switch", "after it"])
def test_a_resumed_run_equals_an_uninterrupted_one(here, argv, kind, stop):
    whole = train_here(argv("whole", f"{kind} {CONTROL}"))
    train_here(argv("stopped", f"{kind} {CONTROL} --exit-interval {stop}"))
    resumed = train_here(argv("stopped", f"{kind} {CONTROL}", load="stopped"))
    assert resumed.first_step == stop
    assert_same_run(resumed, whole)


def test_a_resumption_without_the_draw_differs(here, argv, monkeypatch):
    """The negative control."""
    whole = train_here(argv("whole", CONTROL))
    train_here(argv("stopped", f"{CONTROL} --exit-interval 4"))
    monkeypatch.setattr(Run, "reinitialized_at", ())
    with pytest.raises(AssertionError):
        assert_same_run(train_here(argv("stopped", CONTROL, load="stopped")), whole)


def test_the_redraw_is_off_by_default_and_raises_the_loss(here, argv, monkeypatch):
    control = curve(train_here(argv("control", CONTROL)))
    monkeypatch.setattr(loop, "reinitialize", None)
    plain = curve(train_here(argv("plain")))
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (plain, control)]
    assert losses[0][:4] == losses[1][:4]
    assert losses[0][4] < losses[1][4]
