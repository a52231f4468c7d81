"""What Megatron-LM's trainer can do and bags cannot: refused by name, each with the reason."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_tst.config import UserError


@dataclass(frozen=True)
class Conflict:
    """A setting that cannot be combined with this trainer.

    Attributes:
        flag: as it is typed.
        name: of the argument.
        reason: why, and what to do instead.
        is_met: whether a value of it is in the way.
    """

    flag: str
    name: str
    reason: str
    is_met: Callable[[Any], bool] = bool


_IN_TOKENS = "is counted in data tokens, of which a position holds many while bags are read"
_OWN_DATA = "the samples are this project's, dealt to the phases"

CONFLICTS = (
    Conflict("--mtp-num-layers", "mtp_num_layers", "multi-token prediction shifts the last axis, which is the bag"),
    Conflict("--mtp-hybrid-override-pattern", "mtp_hybrid_override_pattern", "multi-token prediction shifts the last axis, which is the bag"),
    Conflict("--sft", "sft", f"a packed sequence {_IN_TOKENS}"),
    Conflict("--dataloader-inter-document-masking", "dataloader_inter_document_masking", f"where a document ends {_IN_TOKENS}"),
    Conflict("--reset-position-ids", "reset_position_ids", f"where a document ends {_IN_TOKENS}"),
    Conflict("--reset-attention-mask", "reset_attention_mask", f"where a document ends {_IN_TOKENS}"),
    Conflict("--hybrid-context-parallel", "hybrid_context_parallel", f"the length by which sequences are distributed {_IN_TOKENS}"),
    Conflict("--cuda-graph-impl full_iteration", "cuda_graph_impl", "the graph's input has the shape of the first phase; local and transformer_engine capture layers, whose shapes stay", lambda value: value == "full_iteration"),
    Conflict("--overlap-moe-expert-parallel-comm", "overlap_moe_expert_parallel_comm", "its schedule plan is not built for bags yet"),
    Conflict("--tensor-parallel-num-weight-shards", "tensor_parallel_num_weight_shards", "a weight-sharded embedding does not take bags", lambda value: value not in (None, 1)),
    Conflict("--expert-tensor-parallel-num-weight-shards", "expert_tensor_parallel_num_weight_shards", "weight shards are not tried with bags", lambda value: value not in (None, 1)),
    Conflict("--step-batch-size-schedule", "step_batch_size_schedule", "the phases' shares of the text follow from a constant batch"),
    Conflict("--decrease-batch-size-if-needed", "decrease_batch_size_if_needed", "the phases' shares of the text follow from a constant batch"),
    Conflict("--train-samples", "train_samples", "a run is counted in steps: use --train-iters"),
    Conflict("--phase-transition-iterations", "phase_transition_iterations", "it starts the count of samples anew, by which the phases are told apart"),
    Conflict("--iterations-to-skip", "iterations_to_skip", "it fetches --seq-length tokens per sample, of which a bag's have more"),
    Conflict("--fim-data", "fim_data", "rearranged text is not dealt to the phases"),
    Conflict("--mock-data", "mock_data", f"{_OWN_DATA}: use --data-path"),
    Conflict("--data-args-path", "data_args_path", f"{_OWN_DATA}: use --data-path"),
    Conflict("--per-split-data-args-path", "per_split_data_args_path", f"{_OWN_DATA}: use --train-data-path and --valid-data-path"),
    Conflict("--test-data-path", "test_data_path", f"{_OWN_DATA}, and nothing is held out for a test"),
    Conflict("--dataloader-type", "dataloader_type", f"{_OWN_DATA}, in the order of --seed", lambda value: value not in (None, "single")),
    Conflict("--full-validation", "full_validation", "every evaluation reads the same --eval-iters batches"),
    Conflict("--multiple-validation-sets", "multiple_validation_sets", "validation is one blend"),
    Conflict("--perform-rl-step", "perform_rl_step", "it has no meaning for pre-training with superposition"),
    Conflict("--vision-pretraining", "vision_pretraining", "it has no meaning for pre-training with superposition"),
    Conflict("--yaml-cfg", "yaml_cfg", "use --config, whose section megatron_lm takes every flag"),
    Conflict("--logits-save-dir", "logits_save_dir", "distillation is not tried with bags"),
    Conflict("--logits-load-dir", "logits_load_dir", "distillation is not tried with bags"),
    Conflict("--fp16", "fp16", "use --bf16: the loss of bags is not tried with a loss scale"),
    Conflict("--skip-train", "skip_train", "there is nothing to train"),
    Conflict("--use-checkpoint-args", "use_checkpoint_args", "the run's settings come from --config and flags"),
    Conflict("--tst-reinitialize-at-switch", "tst_reinitialize_at_switch", "the negative control is built for --tst-trainer own alone"),
)  # fmt: skip


def refuse_conflicts(args: Namespace) -> None:
    """Refuse what bags cannot be combined with.

    Args:
        args: Megatron-LM's, as they were parsed.

    Raises:
        UserError: naming the first such flag, and why.
    """
    for conflict in CONFLICTS:
        value = getattr(args, conflict.name, None)
        if conflict.is_met(value):
            shown = conflict.flag if value is True or " " in conflict.flag else f"{conflict.flag} {_typed(value)}"
            raise UserError(f"{shown}: cannot be combined with --tst-trainer megatron-lm: {conflict.reason}")
    if "/" in (getattr(args, "hybrid_layer_pattern", None) or ""):
        raise UserError(
            f"--hybrid-layer-pattern {args.hybrid_layer_pattern}: cannot be combined with --tst-trainer megatron-lm: "
            "what stands after / is multi-token prediction, which shifts the last axis, the bag"
        )


def _typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
