"""One optimizer step: normalization of the loss, FLOPs of either phase, timing."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_tst.data.batches import make_batch
from megatron_tst.superposition import Phase, bag_weights, multi_hot_cross_entropy
from tests.training.runs import arguments, build_here, parameters

SUPERPOSED = "--tst-bag-size 4 --tst-steps 4 --tst-bag-weights power_law"


@pytest.fixture
def run(here, corpus, tokenizer, tmp_path: Path):
    return build_here(arguments(corpus, str(tokenizer.path), tmp_path / "run", SUPERPOSED))


def batches(run, bag_size):
    torch.manual_seed(0)
    texts = [torch.randint(1, run.shape.vocab_size, (2, 16 * bag_size + 1)) for _ in range(2)]
    made = [make_batch(text, run.batch_shape(Phase(bag_size, 1))) for text in texts]
    # With unequal numbers of valid targets, the mean of the micro-batches' means differs from the global mean.
    made[0].labels[:, 3:] = -100
    object.__setattr__(made[0], "weight", reference_loss(run, made[:1])[1])
    return made


def reference_loss(run, made):
    """Return the reference's loss sum and weight of all micro-batches, from the model's own logits."""
    total, weight = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for batch in made:
        labels = batch.labels.view(2, 16, -1)
        logits = run.stepper.train_state.chunks[0](batch.inputs, batch.position_ids, None).detach()
        row_loss, row_weight = multi_hot_cross_entropy(logits, labels, bag_weights("power_law", labels.shape[-1]))
        total, weight = total + row_loss.double().sum(), weight + row_weight.sum()
    return total, weight


@pytest.mark.parametrize("bag_size", [1, 4])
def test_the_loss_is_the_global_sum_over_the_global_weight(run, bag_size):
    made = batches(run, bag_size)
    total, weight = reference_loss(run, made)
    loss = run.stepper.train(made).loss
    assert float(loss) == pytest.approx(float(total / weight), rel=1e-6)


def test_a_mean_of_means_differs(run):
    made = batches(run, 4)
    parts = [float(torch.div(*reference_loss(run, [batch]))) for batch in made]
    assert float(run.stepper.train(made).loss) != pytest.approx(sum(parts) / 2, rel=1e-4)


def test_micro_batch_size_changes_neither_loss_nor_gradient(here, corpus, tokenizer, tmp_path):
    reports, updated = [], []
    for size in (1, 4):
        argv = arguments(corpus, str(tokenizer.path), tmp_path / str(size), f"{SUPERPOSED} --micro-batch-size {size}")
        run = build_here(argv)
        reader = run.read(run.data.train, run.schedule, 0)
        shape = run.batch_shape(Phase(4, 1))
        report = run.stepper.train([reader.read(shape) for _ in range(run.stepper.num_microbatches)])
        reports.append((float(report.loss), report.grad_norm))
        updated.append(parameters(run))
    assert reports[0] == pytest.approx(reports[1], rel=1e-5)
    for name, value in updated[0].items():
        torch.testing.assert_close(value, updated[1][name], rtol=1e-4, atol=1e-6)


def test_a_step_without_targets_has_zero_loss_and_no_gradient(run):
    made = batches(run, 4)
    for batch in made:
        batch.labels.fill_(-100)
        batch.weight.zero_()
    before = parameters(run)
    report = run.stepper.train(made)
    assert float(report.loss) == report.grad_norm == 0.0
    assert all(torch.equal(before[name], value) for name, value in parameters(run).items())


def test_both_phases_have_the_same_activations_and_flops(run):
    def watch(bag_size):
        shapes: list[tuple[str, torch.Size]] = []
        decoder = run.stepper.train_state.chunks[0].module.decoder
        hooks = [
            module.register_forward_hook(
                lambda _, __, output, name=name: shapes.extend(
                    (name, item.shape)
                    for item in (output if isinstance(output, tuple) else (output,))
                    if torch.is_tensor(item)
                )
            )
            for name, module in decoder.named_modules()
        ]
        made = batches(run, bag_size)
        with FlopCounterMode(display=False) as counter:
            run.stepper.train(made)
        for hook in hooks:
            hook.remove()
        return shapes, counter.get_total_flops()

    superposed, ordinary = watch(4), watch(1)
    assert superposed == ordinary
    assert len(superposed[0]) > 20


def test_evaluation_does_not_change_the_model(run):
    made, before = batches(run, 1), parameters(run)
    first, second = run.stepper.evaluate(made), run.stepper.evaluate(made)
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], value) for name, value in parameters(run).items())


class Clock:
    """A clock that advances only when a test tells it to."""

    def __init__(self):
        self.now = 0.0

    def time(self):
        return self.now

    def slow(self, function, seconds):
        """Wrap a function so that it advances this clock by the given seconds."""

        def run(*arguments_, **named):
            self.now += seconds
            return function(*arguments_, **named)

        return run


def test_communication_time_covers_reductions_and_gathers(here, corpus, tokenizer, tmp_path: Path, monkeypatch):
    argv = arguments(corpus, str(tokenizer.path), tmp_path / "run", f"{SUPERPOSED} --use-distributed-optimizer")
    run, clock = build_here(argv), Clock()
    monkeypatch.setattr("megatron.core.timers.time", clock)
    chunk = run.stepper.train_state.chunks[0]
    monkeypatch.setattr(chunk, "finish_grad_sync", clock.slow(chunk.finish_grad_sync, 5.0))
    (bucket_group,) = chunk.bucket_groups
    monkeypatch.setattr(bucket_group, "start_param_sync", clock.slow(bucket_group.start_param_sync, 2.0))
    made = batches(run, 4)
    assert [run.stepper.train(made).times.communication_s for _ in range(2)] == [7.0, 7.0]
    # Communication inside the passes is not counted.
    monkeypatch.setattr(chunk, "forward", clock.slow(chunk.forward, 100.0))
    assert run.stepper.train(made).times.communication_s == 7.0
    run.directory.leave()


def test_each_parameter_group_has_its_learning_rate(run):
    groups = run.stepper.train_state.optimizer.param_groups
    for group in groups:
        group["lr"] = 0.5 if group["wd_mult"] else 0.25
    report = run.stepper.train(batches(run, 4))
    assert report.lr_by_group == {"decay": 0.5, "no_decay": 0.25}
