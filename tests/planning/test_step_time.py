"""The communication volumes of a step, compared with those of real ranks, and the arithmetic of its time."""

import dataclasses
from collections import Counter

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tst.config import check_layout, parse_config, read_config
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.planning.step_time import calibrate, communication_volumes, estimate_step, run_step_flops
from megatron_tst.shape import forward_flops_per_sequence, resolve_shape
from megatron_tst.shape.hardware import find_gpu
from megatron_tst.training import start_run
from tests.distributed.launch import run_distributed
from tests.training.runs import arguments

MOE = "--num-experts 4 --moe-ffn-hidden-size 16 "
RUN = "--micro-batch-size 2 --global-batch-size 8 --eval-iters 0 --vocab-size 300 "
PRESET = (
    "--tst-preset 3b --micro-batch-size 2 --global-batch-size 512 --train-iters 10 --bf16 --use-distributed-optimizer "
    "--accumulate-allreduce-grads-in-fp32 "
)


GATHERED = ("_allgather_base_", "allgather_into_tensor_coalesced_")
REDUCED = ("allreduce_", "allreduce_coalesced_")
SCATTERED = ("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_")


class Traffic(TorchDispatchMode):
    """Adds up the bytes that one of two ranks sends in each collective: half of the gathered or scattered bytes."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in (*GATHERED, *SCATTERED, *REDUCED, "alltoall_base_"):
            # An all-reduce is a scatter and a gather.
            size = max(tensor.nbytes for tensor in tree_leaves(args[:2]) if isinstance(tensor, Tensor))
            self.sent[name] += size if name in REDUCED else size // 2
        return func(*args, **(kwargs or {}))


def count(argv):
    run = start_run(parse_config(argv), StopSignals())
    batches = run.read_step(run.read(run.data.train, run.schedule, 0, 0), run.schedule.phases[0])
    with Traffic() as traffic:
        run.stepper.train(batches)
    return traffic.sent


def counted(corpus, tokenizer, folder, extras):
    argvs = [arguments(corpus, str(tokenizer.path), folder / str(n), RUN + extra) for n, extra in enumerate(extras)]
    traffic = [run_distributed(count, 2, argv) for argv in argvs]
    return [parse_config(argv) for argv in argvs], list(zip(*traffic, strict=True))


def more(configs, name):
    """Return the bytes that two more layers add to a collective, according to the model."""
    few, many = (communication_volumes(config, 2)[name] for config in configs)
    return many - few


@pytest.mark.distributed
@pytest.mark.parametrize("split", ["--sequence-parallel", ""], ids=["gathers and scatters", "reduces"])
def test_tensor_parallel_volumes_match_real_ranks(corpus, tokenizer, tmp_path, split):
    layout = f"--tensor-model-parallel-size 2 {split} --num-layers "
    configs, ranks = counted(corpus, tokenizer, tmp_path, [layout + "2", layout + "4"])
    for few, many in ranks:
        sent = many - few
        # Sequence parallelism also reduces the gradients of norms once per step, which the model does not count.
        reduced = 0 if split else sent["allreduce_"]
        assert sum(sent[name] for name in (*GATHERED, *SCATTERED)) + reduced == more(configs, "tensor parallel")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("dispatcher", "names", "rel"), [("alltoall", ("alltoall_base_",), 0.1), ("allgather", GATHERED + SCATTERED, 0.15)]
)
def test_an_moe_layer_exchanges_hidden_states_four_times(corpus, tokenizer, tmp_path, dispatcher, names, rel):
    """The router's probabilities are exchanged too, but they are small."""
    layout = f"{MOE} --moe-token-dispatcher-type {dispatcher} --expert-model-parallel-size 2 --num-layers "
    configs, ranks = counted(corpus, tokenizer, tmp_path, [layout + "2", layout + "4"])
    # A rank may receive more or less than it sends, depending on the router, so the mean over the ranks is compared.
    sent = sum((many - few)[name] for few, many in ranks for name in names) / 2
    assert sent == pytest.approx(more(configs, "expert exchange"), rel=rel)


@pytest.mark.distributed
def test_gradients_are_scattered_and_parameters_gathered_once(corpus, tokenizer, tmp_path):
    (config,), ranks = counted(corpus, tokenizer, tmp_path, ["--use-distributed-optimizer --bf16"])
    volumes = communication_volumes(config, 2)
    for (sent,) in ranks:
        assert sum(sent[name] for name in SCATTERED) == pytest.approx(volumes["gradient reduction"], rel=0.01)
        assert sum(sent[name] for name in GATHERED) == pytest.approx(volumes["parameter all-gather"], rel=0.01)


@pytest.mark.distributed
def test_gradients_are_all_reduced_without_a_distributed_optimizer(corpus, tokenizer, tmp_path):
    (config,), ranks = counted(corpus, tokenizer, tmp_path, ["--bf16"])
    volumes = communication_volumes(config, 2)
    assert set(volumes) == {"gradient reduction"}
    for (sent,) in ranks:
        assert sum(sent[name] for name in REDUCED) == pytest.approx(volumes["gradient reduction"], rel=0.01)


def layout(extra=""):
    config = read_config((PRESET + extra).split())
    check_layout(config)
    return config


def test_a_step_without_communication_takes_its_compute_time():
    config, gpu = layout(), find_gpu("b200")
    step = estimate_step(config, gpu, 1, efficiency=0.5)
    flops = 3 * 512 * forward_flops_per_sequence(resolve_shape(config.model))
    assert step.total == pytest.approx(flops / (0.5 * 2250e12))
    assert (step.bubble, step.exposed, dict(step.volumes)) == (0, 0, {})
    assert estimate_step(config, gpu, 1, efficiency=0.25).total == pytest.approx(2 * step.total)


def test_full_recomputation_adds_a_fourth_pass():
    plain, again = (
        estimate_step(layout(extra), find_gpu("b200"), 1, 0.5)
        for extra in ("", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    )
    # The output layer is not recomputed.
    model = layout().model
    head = 2 * model.seq_length * model.hidden_size * 128256
    share = 1 - head / forward_flops_per_sequence(resolve_shape(model))
    assert again.compute == pytest.approx(plain.compute * (1 + share / 3))
    block = "--recompute-granularity full --recompute-method block --recompute-num-layers 9"
    some = estimate_step(layout(block), find_gpu("b200"), 1, 0.5)
    assert some.compute == pytest.approx(plain.compute * (1 + share / 4 / 3))
    selective = estimate_step(layout("--recompute-granularity selective"), find_gpu("b200"), 1, 0.5)
    assert plain.compute < selective.compute < some.compute


@pytest.mark.parametrize(("virtual", "share"), [("", 3 / 64), ("--num-layers-per-virtual-pipeline-stage 3", 1 / 64)])
def test_the_bubble_follows_from_stages_and_micro_batches(virtual, share):
    config = layout(f"--pipeline-model-parallel-size 4 --global-batch-size 512 {virtual}")
    step = estimate_step(config, find_gpu("b200"), 16, 0.5)
    assert step.bubble == pytest.approx(step.compute * share)


def test_overlap_hides_the_reduction_behind_the_last_backward_pass():
    gpu = find_gpu("b200")
    shown = estimate_step(layout(), gpu, 64, 0.5)
    hidden = estimate_step(layout("--overlap-grad-reduce --overlap-param-gather"), gpu, 64, 0.5)
    assert shown.exposed == pytest.approx(sum(shown.times.values()))
    assert hidden.exposed < shown.exposed
    # The reduction among nodes uses all eight network cards of a node.
    gradients = communication_volumes(layout(), 64)["gradient reduction"]
    assert shown.times["gradient reduction"] == pytest.approx(gradients / (8 * gpu.network_gb_per_s * 1e9))


def test_an_exchange_between_nodes_uses_the_network():
    moe = "--tst-preset 10b-a1b --micro-batch-size 1 --global-batch-size 1024 --train-iters 10 --bf16 "
    moe += "--use-distributed-optimizer --moe-token-dispatcher-type alltoall"
    inside, outside = (
        estimate_step(read_config(f"{moe} --expert-model-parallel-size {ep}".split()), find_gpu("b200"), 64, 0.2)
        for ep in (8, 64)
    )
    name = "expert exchange"
    assert outside.times[name] / inside.times[name] > 10
    assert inside.times[name] == pytest.approx(inside.volumes[name] / 900e9)


def test_expert_replicas_use_fewer_network_cards_of_a_node():
    """With 64 GPUs in nodes of 8 and ep 8, each of the 8 replicas of an expert is on another node."""
    moe = read_config(
        "--tst-preset 10b-a1b --micro-batch-size 1 --global-batch-size 1024 --train-iters 10 --bf16 "
        "--use-distributed-optimizer --expert-model-parallel-size 8".split()
    )
    gpu = find_gpu("b200")
    step = estimate_step(moe, gpu, 64, 0.2)
    for part, cards in (("gradient reduction", 8), ("experts' gradient reduction", 1)):
        bytes_per_s = cards * gpu.network_gb_per_s * 1e9
        assert step.times[part] == pytest.approx(step.volumes[part] / bytes_per_s)


def test_context_parallelism_does_not_reduce_the_bandwidth():
    gpu = find_gpu("b200")
    one, eight = (
        estimate_step(layout(f"--context-parallel-size {cp} --global-batch-size 512"), gpu, 64, 0.5) for cp in (1, 8)
    )
    assert eight.times["gradient reduction"] == pytest.approx(one.times["gradient reduction"])


def test_an_mfu_refers_to_the_whole_step():
    config, gpu = layout("--pipeline-model-parallel-size 4"), find_gpu("b200")
    efficiency = calibrate(config, gpu, 64, 0.3)
    step = estimate_step(config, gpu, 64, efficiency)
    assert step.bubble > 0 < step.exposed
    assert run_step_flops(config, 64) / (64 * gpu.peak_tflops * 1e12 * step.total) == pytest.approx(0.3)
    assert efficiency > 0.31
    assert calibrate(layout(), gpu, 1, 0.3) == pytest.approx(0.3)
    # Here communication alone takes longer than the step.
    assert calibrate(config, gpu, 64, 0.99) == pytest.approx(1.0)


def test_half_the_layers_send_half_the_bytes():
    config = layout("--tensor-model-parallel-size 2 --sequence-parallel")
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=18))
    name = "tensor parallel"
    assert communication_volumes(config, 2)[name] == 2 * communication_volumes(half, 2)[name]
