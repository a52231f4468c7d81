"""The memory model, compared with the tensors of real training steps by part and rank."""

import dataclasses
import gc

import pytest
import torch

from megatron_tst.config import parse_config
from megatron_tst.distributed import destroy_parallel_state
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.planning.memory import Memory, micro_batches_under_way, pipeline_memory
from megatron_tst.training import start_run
from tests.allocations import Allocations
from tests.distributed.launch import run_distributed
from tests.training.runs import arguments

pytestmark = pytest.mark.distributed

SHAPE = (
    "--seq-length 256 --micro-batch-size 8 --global-batch-size 16 --hidden-size 64 --ffn-hidden-size 160 "
    "--num-layers 4 --vocab-size 1000 --eval-iters 0 "
)
MOE = "--num-experts 8 --moe-ffn-hidden-size 40 --moe-router-topk 2 "
ALONE = {
    "dense": "",
    "bf16": "--bf16 --accumulate-allreduce-grads-in-fp32",
    "bf16-gradients": "--bf16 --use-distributed-optimizer",
    "gqa": "--group-query-attention --num-query-groups 2",
    "qk-norm": "--qk-layernorm",
    "qk-norm-bf16": "--qk-layernorm --bf16",
    "moe": MOE,
    "moe-bf16": MOE + "--bf16 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 1e-3",
    "selective": "--recompute-granularity selective",
    "recomputed": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "recomputed-pairs": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
    "recomputed-block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    "small-vocabulary": "--vocab-size 301",
    "large-vocabulary": "--vocab-size 4000",
    "linear-loss": "--vocab-size 4000 --cross-entropy-fusion-impl linear",
    "linear-loss-bf16": "--vocab-size 4000 --cross-entropy-fusion-impl linear --bf16",
    "superposed": "--tst-bag-size 4 --tst-step-ratio 0.5",
}
TOGETHER = {
    "pp2": "--pipeline-model-parallel-size 2 --global-batch-size 32",
    "pp2-interleaved": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
    "--global-batch-size 32",
    "tp2": "--tensor-model-parallel-size 2",
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "ep2-allgather": MOE + "--expert-model-parallel-size 2",
    "ep2": MOE + "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
    "sharded": "--use-distributed-optimizer --bf16",
}


def measure(argv):
    """Take a step, then a measured one; return this rank's bytes by part and its place in the pipeline."""
    run = start_run(parse_config(argv), StopSignals())
    reader = run.read(run.data.train, run.schedule, 0, 0)
    phase = run.schedule.phases[0]
    run.stepper.train(run.read_step(reader, phase))
    batches = run.read_step(reader, phase)
    gc.collect()
    with Allocations(thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)) as allocations:
        run.stepper.forward_backward(batches, forward_only=False)
    chunks = run.stepper.train_state.chunks
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    parts = {
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(map(optimizer_bytes, run.stepper.train_state.optimizer.chained_optimizers)),
        "passes": allocations.peak,
    }
    stage = torch.distributed.get_rank(run.ranks.groups.pp)
    run.directory.leave()
    destroy_parallel_state()
    return parts, stage


def optimizer_bytes(optimizer):
    inner = optimizer.optimizer
    moments = [value for state in inner.state.values() for value in state.values() if value.numel() > 1]
    weights = [weight for group in inner.param_groups for weight in group["params"]]
    has_copies = getattr(optimizer.config, "bf16", False)
    return sum(tensor.nbytes for tensor in (*moments, *(weights if has_copies else ())))


def measure_all(command_lines):
    return [measure(argv) for argv in command_lines]


@pytest.fixture(scope="module")
def measured_alone(corpus, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    lines = [arguments(corpus, str(tokenizer.path), folder / name, SHAPE + extra) for name, extra in ALONE.items()]
    (results,) = run_distributed(measure_all, 1, lines)
    return {name: (line, [result]) for name, line, result in zip(ALONE, lines, results, strict=True)}


def differences(argv, results, num_gpus):
    """Return the relative error of the model by stage and part."""
    stages = pipeline_memory(parse_config(argv), num_gpus, fused=False)
    found = {}
    for parts, stage in results:
        memory = stages[stage]
        modelled = {
            **dataclasses.asdict(memory),
            "passes": memory.activations + max(memory.logits_and_loss, memory.backward),
        }
        found |= {(stage, name): modelled[name] / size - 1 for name, size in parts.items()}
    return found


def check(argv, results, num_gpus):
    for (stage, name), difference in differences(argv, results, num_gpus).items():
        assert abs(difference) < (0.1 if name == "passes" else 0.01), (stage, name, difference)


@pytest.mark.parametrize("name", ALONE)
def test_the_model_matches_one_rank(measured_alone, name):
    check(*measured_alone[name], num_gpus=1)


@pytest.mark.parametrize("name", TOGETHER)
def test_the_model_matches_two_ranks(corpus, tokenizer, tmp_path, name):
    argv = arguments(corpus, str(tokenizer.path), tmp_path / "run", SHAPE + TOGETHER[name])
    check(argv, run_distributed(measure, 2, argv), num_gpus=2)


@pytest.mark.parametrize(("run", "taken_for"), [("moe", "dense"), ("recomputed", "dense"), ("dense", "bf16")])
def test_the_model_of_another_run_does_not_match(measured_alone, run, taken_for):
    (_, results), (argv, _) = measured_alone[run], measured_alone[taken_for]
    assert max(map(abs, differences(argv, results, 1).values())) > 0.2


def test_later_stages_hold_fewer_micro_batches(corpus, tokenizer, tmp_path):
    """megatron-core's warm-up runs P - p - 1 forward passes, or 2 (P - p - 1) + (v - 1) P chunks with v chunks."""
    pipeline = "--num-layers 8 --pipeline-model-parallel-size 4 --micro-batch-size 1 --global-batch-size 8"
    plain = parse_config(arguments(corpus, str(tokenizer.path), tmp_path, pipeline))
    interleaved = parse_config(
        arguments(corpus, str(tokenizer.path), tmp_path, f"{pipeline} --num-layers-per-virtual-pipeline-stage 1")
    )
    assert [micro_batches_under_way(plain, 4, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [micro_batches_under_way(interleaved, 4, stage) for stage in range(4)] == [5.5, 4.5, 3.5, 2.5]
    assert [micro_batches_under_way(plain, 16, stage) for stage in range(4)] == [2, 2, 2, 1]


def test_only_the_larger_of_loss_and_backward_counts():
    assert Memory(1, 2, 3, 4, 20, 10).total == 30
    assert Memory(1, 2, 3, 4, 10, 20).total == 30
