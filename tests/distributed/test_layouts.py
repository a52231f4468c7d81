"""Every layout trains like one rank: runs across the switch are compared with a one-rank run on the same batches."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_distributed
from tests.distributed.layouts import Outcome, initial_weights, train_layout, whole
from tests.training.runs import TRAINING

pytestmark = pytest.mark.distributed

DENSE = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 8 --group-query-attention "
    "--num-query-groups 4 --seq-length 16 --swiglu --normalization RMSNorm --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 "
    "--make-vocab-size-divisible-by 8 --use-cpu-initialization"
)
TIED = DENSE.replace("--untie-embeddings-and-output-weights ", "")
MOE = (
    f"{DENSE} --num-experts 4 --moe-ffn-hidden-size 24 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
    "--moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 --qk-layernorm"
)
RUN = "--tst-bag-size 4 --tst-steps 4 --tst-bag-weights power_law --eod-mask-loss"

RECOMPUTE_ALL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

# name: (model, world size, flags)
LAYOUTS = {
    "tp2": (DENSE, 2, "--tensor-model-parallel-size 2"),
    "tp4": (DENSE, 4, "--tensor-model-parallel-size 4"),
    "tp2-sp": (DENSE, 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "tp4-sp": (DENSE, 4, "--tensor-model-parallel-size 4 --sequence-parallel"),
    "pp2": (DENSE, 2, "--pipeline-model-parallel-size 2"),
    "pp4": (DENSE, 4, "--pipeline-model-parallel-size 4"),
    "pp2-interleaved": (DENSE, 2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "pp2-tied": (TIED, 2, "--pipeline-model-parallel-size 2"),
    "tp2-tied": (TIED, 2, "--tensor-model-parallel-size 2"),
    "dp2": (DENSE, 2, ""),
    "dp2-distributed-optimizer": (DENSE, 2, "--use-distributed-optimizer"),
    "tp2-sp-experts": (MOE, 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "ep2": (MOE, 2, "--expert-model-parallel-size 2"),
    "tp2-dp2-distributed-optimizer": (DENSE, 4, "--tensor-model-parallel-size 2 --use-distributed-optimizer"),
    "cp2": (DENSE, 2, "--context-parallel-size 2"),
    "cp2-dp2-distributed-optimizer": (DENSE, 4, "--context-parallel-size 2 --use-distributed-optimizer"),
    "tp2-sp-cp2": (DENSE, 4, "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2"),
    "pp2-cp2-ep2": (
        MOE,
        4,
        "--pipeline-model-parallel-size 2 --context-parallel-size 2 --expert-model-parallel-size 2",
    ),
    "tp2-sp-pp2-ep2": (
        MOE,
        8,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--expert-model-parallel-size 2",
    ),
}


@pytest.fixture(scope="module")
def setup(corpus, tokenizer, tmp_path_factory):
    """Return a function for argument lists and one that trains each model on one rank once, from initial weights."""
    folder: Path = tmp_path_factory.mktemp("layouts")
    # A frequent token marks the end of documents, so that ranks and micro-batches differ in their valid targets.
    shutil.copy(tokenizer.path, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "e"}')
    known: dict[str, tuple[dict[str, torch.Tensor], Outcome]] = {}

    def argv(name: str, model: str, extra: str = "") -> list[str]:
        files = ["--data-path", corpus, "--tokenizer-model", str(folder), "--tst-run-dir", str(folder / name)]
        return [*model.split(), *TRAINING, *RUN.split(), *files, *extra.split()]

    def one_rank(model: str, extra: str = "") -> tuple[dict[str, torch.Tensor], Outcome]:
        key = model + extra
        if key not in known:
            initial = run_distributed(initial_weights, 1, argv(f"initial{len(known)}", model, extra))[0]
            outcome = run_distributed(train_layout, 1, argv(f"one{len(known)}", model, extra), initial)[0]
            known[key] = initial, outcome
        return known[key]

    return argv, one_rank


def train_as(setup, name: str, extra: str = "") -> tuple[Outcome, list[Outcome]]:
    argv, one_rank = setup
    model, world_size, flags = LAYOUTS[name]
    initial, alone = one_rank(model, extra)
    label = f"{name}{len(extra)}"
    return alone, run_distributed(train_layout, world_size, argv(label, model, f"{extra} {flags}"), initial)


def assert_same_training(alone: Outcome, ranks: list[Outcome]) -> None:
    main = ranks[0]
    assert len(alone.losses) == 8
    assert main.losses[0] == pytest.approx(alone.losses[0], rel=1e-6)
    assert main.grad_norms[0] == pytest.approx(alone.grad_norms[0], rel=1e-5)
    assert main.losses == pytest.approx(alone.losses, rel=1e-4)
    # Rounding may change top-k routing; with these sizes and seeds it does not.
    assert main.expert_counts == alone.expert_counts
    assert main.valid == pytest.approx(alone.valid, rel=1e-4)
    wanted, found = whole(alone.pieces), whole([piece for rank in ranks for piece in rank.pieces])
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        rows = min(value.shape[0], found[key].shape[0])  # the padding of the vocabulary depends on the layout
        torch.testing.assert_close(
            found[key][:rows], value[:rows], rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_one_rank_does(setup, name):
    assert_same_training(*train_as(setup, name))


@pytest.mark.parametrize("name", ["tp2-sp", "pp2", "tp2-dp2-distributed-optimizer"])
def test_layout_trains_as_one_rank_does_in_bf16(setup, name):
    alone, ranks = train_as(setup, name, "--bf16 --accumulate-allreduce-grads-in-fp32")
    assert ranks[0].losses == pytest.approx(alone.losses, abs=2e-2)
    assert all(part.dtype == torch.bfloat16 for _, _, _, part in ranks[0].pieces)


@pytest.mark.parametrize("flags", ["--recompute-granularity selective", RECOMPUTE_ALL])
def test_recomputing_activations_does_not_change_training(setup, flags):
    argv, one_rank = setup
    initial, alone = one_rank(MOE)
    again = run_distributed(train_layout, 1, argv(f"recompute{len(flags)}", MOE, flags), initial)[0]
    assert again.losses == pytest.approx(alone.losses, rel=1e-6)
    assert again.grad_norms == pytest.approx(alone.grad_norms, rel=1e-5)


def test_expert_counts_add_up_to_the_positions(setup):
    _, alone = setup[1](MOE)
    # In both phases a step has 4 sequences of 16 positions, each of which uses 2 experts in each layer.
    assert len(alone.expert_counts) == 8
    assert {sum(layer) for step in alone.expert_counts for layer in step} == {4 * 16 * 2}


@pytest.mark.parametrize("name", ["dp2", "tp2-dp2-distributed-optimizer", "pp4"])
def test_layouts_read_the_same_text(setup, name):
    alone, ranks = train_as(setup, name, "--log-interval 2")
    wanted = sorted({row for batch in alone.text for row in batch})
    assert sorted({row for rank in ranks for batch in rank.text for row in batch}) == wanted
    if name == "dp2":
        assert ranks[0].text != ranks[1].text
        assert sum(map(len, ranks[0].text)) == sum(map(len, ranks[1].text)) == sum(map(len, alone.text)) / 2
    if name == "pp4":
        assert [bool(rank.text) for rank in ranks] == [True, False, False, True]


@pytest.mark.parametrize("name", ["pp2", "tp2-sp", "tp2-sp-pp2-ep2"])
def test_activation_shapes_do_not_change_at_the_switch(setup, name):
    _, ranks = train_as(setup, name, "--log-interval 3")
    for rank in ranks:
        assert rank.shapes and len(set(rank.shapes)) == 1
