"""Training with bag size 1, compared with a training loop that uses only megatron-core."""

from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_tst.data.batches import BatchLoader
from megatron_tst.distributed import seed_everything
from megatron_tst.megatron_patches import find_libraries
from megatron_tst.model import transformer_config
from megatron_tst.model.layers import block_spec
from megatron_tst.superposition import Phase
from megatron_tst.telemetry import read_metrics
from tests.training.runs import arguments, config_of, train_here


def bare_loop(run, shift_labels=0):
    """Return the losses and gradient norms of megatron-core's stock classes on the run's own text."""
    config = run.config
    seed_everything(config.training.seed)
    transformer = transformer_config(config.model, run.shape, config.training, config.parallel, find_libraries())
    model = GPTModel(
        transformer, block_spec(transformer, False), vocab_size=run.shape.vocab_size, max_sequence_length=16,
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
    )  # fmt: skip
    transformer.finalize_model_grads_func = finalize_model_grads
    model = DistributedDataParallel(transformer, DistributedDataParallelConfig(), model)
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-2, min_lr=0.0, weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8,
        clip_grad=1.0, params_dtype=torch.float32,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, [model])
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=1e-2, min_lr=0.0, lr_warmup_steps=2, lr_decay_steps=8, lr_decay_style="cosine",
        start_wd=0.01, end_wd=0.01, wd_incr_steps=8, wd_incr_style="constant",
    )  # fmt: skip
    reader = BatchLoader(
        run.data.train, run.schedule, run.ranks,
        micro_batch_size=2, global_batch_size=4, vocab_size=run.shape.vocab_size,
    )  # fmt: skip
    shape, history = run.batch_shape(Phase(1, 1)), []

    def forward_step(iterator, model):
        batch = next(iterator)
        labels = batch.labels.roll(shift_labels, dims=1)
        return model(batch.inputs, batch.position_ids, None, labels=labels), lambda loss: (loss.mean(), loss.mean())

    for _ in range(8):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter([reader.read(shape) for _ in range(2)]), model=model,
            num_microbatches=2, seq_length=16, micro_batch_size=2,
        )  # fmt: skip
        _, norm, _ = optimizer.step()
        scheduler.step(increment=1)
        history.append((float(torch.stack(losses).mean()), norm))
    return history


@pytest.fixture
def history(here, corpus, tokenizer, tmp_path: Path):
    run = train_here(arguments(corpus, str(tokenizer.path), tmp_path / "run"))
    lines = [line for line in read_metrics(run.directory.metrics) if "loss" in line]
    return run, [(line["loss"], line["grad_norm"]) for line in lines]


def test_a_run_with_bag_size_one_equals_a_bare_megatron_core_loop(history):
    run, ours = history
    assert len(ours) == 8
    for mine, stock in zip(ours, bare_loop(run), strict=True):
        assert mine == pytest.approx(stock, rel=1e-6)


def test_a_loop_with_shifted_labels_differs(history):
    run, ours = history
    assert ours[-1] != pytest.approx(bare_loop(run, shift_labels=1)[-1], rel=1e-3)


def test_equal_seeds_give_equal_losses(here, corpus, tokenizer, tmp_path: Path):
    def losses(name, seed):
        argv = arguments(corpus, str(tokenizer.path), tmp_path / name, f"--seed {seed} --tst-bag-size 4 --tst-steps 4")
        return [line["loss"] for line in read_metrics(train_here(argv).directory.metrics) if "loss" in line]

    assert losses("a", 1) == losses("b", 1) != losses("c", 2)


def test_the_recorded_config_equals_the_requested_settings(corpus, tokenizer, tmp_path):
    config = config_of(arguments(corpus, str(tokenizer.path), tmp_path, "--tst-bag-size 4 --tst-step-ratio 0.5"))
    assert config.schedule.ends == (4, 8)
