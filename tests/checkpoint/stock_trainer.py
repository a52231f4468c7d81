"""Stock Megatron-LM's own trainer, unchanged, on the CPU.

``tests/checkpoint/stock/VERSION`` holds a checkpoint that it wrote after three steps,

    torchrun -m tests.checkpoint.stock_trainer --save tests/checkpoint/stock/VERSION --save-interval 3 --no-save-rng

The trainer is ``megatron.training`` of the installed megatron-core, which contains it from 0.19 on. For 0.16.1 it is
``pretrain_gpt.py`` of Megatron-LM's tag core_v0.16.1, whose directory is first in PYTHONPATH (needs pybind11 and six).
"""

import functools
import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_tst.megatron_patches.cpu import enter_cpu, enter_cpu_card

STOCK = Path(__file__).parent / "stock"
SAVED_STEP = 3
# The sizes are all different if possible; the other settings have different defaults here and in Megatron-LM.
MODEL = (
    "--num-layers 2 --hidden-size 6 --ffn-hidden-size 12 --num-attention-heads 6 --kv-channels 2 "
    "--group-query-attention --num-query-groups 2 --seq-length 16 --max-position-embeddings 16 --swiglu "
    "--normalization RMSNorm --norm-epsilon 1e-3 --position-embedding-type rope --rotary-base 5000 "
    "--untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 "
    "--init-method-std 0.2 --make-vocab-size-divisible-by 8"
)
TRAINER = (
    "--vocab-size 263 --tokenizer-type NullTokenizer --mock-data --num-workers 0 --transformer-impl local "
    "--distributed-backend gloo --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion "
    "--no-masked-softmax-fusion --no-bias-swiglu-fusion --micro-batch-size 2 --global-batch-size 4 --train-iters 3 "
    "--lr 1e-2 --eval-iters 0 --eval-interval 100 --log-interval 1 --ckpt-format torch_dist"
)


def enter_card() -> None:
    """Make the trainer use the CPU as if it were a GPU."""
    enter_cpu()
    enter_cpu_card()
    from megatron.training import training

    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)


def train() -> None:
    """Read flags and train a GPT with the trainer of the installed version, as ``pretrain_gpt.py`` does."""
    from megatron.core.datasets import utils
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    utils.compile_helpers = lambda: None  # the wheel contains them compiled
    args = parse_and_validate_args()
    build_datasets.is_distributed = True
    settings = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(settings, build_datasets, ModelType.encoder_or_decoder, forward_step)


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Build mock data for training, validation and test."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args

    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, split=args.split, tokenizer=build_tokenizer(args),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()


def forward_step(batches: Any, model: torch.nn.Module, *_: Any) -> Any:
    """Return the model's output for the next batch, and the function that computes the loss from it."""
    batch = next(batches)
    losses_BL = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return losses_BL, functools.partial(loss, batch["loss_mask"])


def loss(mask_BL: torch.Tensor, losses_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum over positions, the number of positions, and the values to log."""
    total, count = (losses_BL * mask_BL).sum(), mask_BL.sum().int()
    return total, count, {"lm loss": torch.stack((total.detach(), count.float()))}


def main(flags: list[str]) -> None:
    """Train with the flags of the recorded model and additional flags."""
    enter_card()
    sys.argv[1:] = [*MODEL.split(), *TRAINER.split(), *flags]
    script = importlib.util.find_spec("pretrain_gpt")
    if script is None:
        train()
    else:
        runpy.run_path(str(script.origin), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
