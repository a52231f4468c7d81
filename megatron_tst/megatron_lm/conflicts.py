"""The flags of Megatron-LM's trainer that cannot be combined with bags; each is refused by name, with the reason."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_tst.config import UserError


@dataclass(frozen=True)
class Conflict:
    """A setting that cannot be combined with this trainer.

    Attributes:
        flag: flag as it is typed.
        name: name of the argument.
        reason: reason of the refusal, and what to do instead.
        is_met: function that returns whether a value of the argument is a conflict.
    """

    flag: str
    name: str
    reason: str
    is_met: Callable[[Any], bool] = bool


_IN_TOKENS = "is counted in data tokens, and a position of the superposition phase holds many of them"
_OWN_DATA = "this project makes the samples and splits them among the phases"

CONFLICTS = (
    Conflict("--mtp-num-layers", "mtp_num_layers", "multi-token prediction shifts the last axis, which is the bag"),
    Conflict("--mtp-hybrid-override-pattern", "mtp_hybrid_override_pattern", "multi-token prediction shifts the last axis, which is the bag"),
    Conflict("--sft", "sft", f"a packed sequence {_IN_TOKENS}"),
    Conflict("--dataloader-inter-document-masking", "dataloader_inter_document_masking", f"the end of a document {_IN_TOKENS}"),
    Conflict("--reset-position-ids", "reset_position_ids", f"the end of a document {_IN_TOKENS}"),
    Conflict("--reset-attention-mask", "reset_attention_mask", f"the end of a document {_IN_TOKENS}"),
    Conflict("--hybrid-context-parallel", "hybrid_context_parallel", f"the length of a sequence, by which sequences are distributed, {_IN_TOKENS}"),
    Conflict("--cuda-graph-impl full_iteration", "cuda_graph_impl", "the graph's input has the shape of the first phase; use local or transformer_engine, which capture layers, whose shapes do not change", lambda value: value == "full_iteration"),
    Conflict("--overlap-moe-expert-parallel-comm", "overlap_moe_expert_parallel_comm", "its schedule plan does not support bags"),
    Conflict("--tensor-parallel-num-weight-shards", "tensor_parallel_num_weight_shards", "a weight-sharded embedding does not take bags", lambda value: value not in (None, 1)),
    Conflict("--expert-tensor-parallel-num-weight-shards", "expert_tensor_parallel_num_weight_shards", "weight shards are not tested with bags", lambda value: value not in (None, 1)),
    Conflict("--step-batch-size-schedule", "step_batch_size_schedule", "the split of the text among the phases assumes a constant batch size"),
    Conflict("--decrease-batch-size-if-needed", "decrease_batch_size_if_needed", "the split of the text among the phases assumes a constant batch size"),
    Conflict("--train-samples", "train_samples", "the length of a run is given in steps: use --train-iters"),
    Conflict("--phase-transition-iterations", "phase_transition_iterations", "it restarts the count of samples, which determines the phase"),
    Conflict("--iterations-to-skip", "iterations_to_skip", "it fetches --seq-length tokens per sample, and a sample of the superposition phase has more"),
    Conflict("--fim-data", "fim_data", "rearranged text cannot be split among the phases"),
    Conflict("--mock-data", "mock_data", f"{_OWN_DATA}: use --data-path"),
    Conflict("--data-args-path", "data_args_path", f"{_OWN_DATA}: use --data-path"),
    Conflict("--per-split-data-args-path", "per_split_data_args_path", f"{_OWN_DATA}: use --train-data-path and --valid-data-path"),
    Conflict("--test-data-path", "test_data_path", f"{_OWN_DATA}, without a test set"),
    Conflict("--dataloader-type", "dataloader_type", f"{_OWN_DATA}, in the order that --seed gives", lambda value: value not in (None, "single")),
    Conflict("--full-validation", "full_validation", "every evaluation reads the same --eval-iters batches"),
    Conflict("--multiple-validation-sets", "multiple_validation_sets", "the validation set is one blend"),
    Conflict("--perform-rl-step", "perform_rl_step", "it has no meaning for pre-training with superposition"),
    Conflict("--vision-pretraining", "vision_pretraining", "it has no meaning for pre-training with superposition"),
    Conflict("--yaml-cfg", "yaml_cfg", "use --config, whose section megatron_lm accepts every flag"),
    Conflict("--logits-save-dir", "logits_save_dir", "distillation is not tested with bags"),
    Conflict("--logits-load-dir", "logits_load_dir", "distillation is not tested with bags"),
    Conflict("--fp16", "fp16", "use --bf16: bags are not tested with loss scaling"),
    Conflict("--skip-train", "skip_train", "there is nothing to train"),
    Conflict("--use-checkpoint-args", "use_checkpoint_args", "the settings of a run come from --config and flags"),
    Conflict("--tst-reinitialize-at-switch", "tst_reinitialize_at_switch", "only --tst-trainer own has this negative control"),
)  # fmt: skip


def refuse_conflicts(args: Namespace) -> None:
    """Refuse flags that cannot be combined with bags.

    Args:
        args: Megatron-LM's arguments, as they were parsed.

    Raises:
        UserError: if there is such a flag; it names the first one and the reason.
    """
    for conflict in CONFLICTS:
        value = getattr(args, conflict.name, None)
        if conflict.is_met(value):
            shown = conflict.flag if value is True or " " in conflict.flag else f"{conflict.flag} {_typed(value)}"
            raise UserError(f"{shown}: cannot be combined with --tst-trainer megatron-lm: {conflict.reason}")
    if getattr(args, "defer_embedding_wgrad_compute", False) and args.cross_entropy_fusion_impl == "linear":
        raise UserError(
            "--defer-embedding-wgrad-compute: cannot be combined with --cross-entropy-fusion-impl linear, which computes "
            "the gradient of the output layer's weight with the loss"
        )
    if "/" in (getattr(args, "hybrid_layer_pattern", None) or ""):
        raise UserError(
            f"--hybrid-layer-pattern {args.hybrid_layer_pattern}: cannot be combined with --tst-trainer megatron-lm: "
            "the part after / is multi-token prediction, which shifts the last axis, which is the bag"
        )


def _typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
