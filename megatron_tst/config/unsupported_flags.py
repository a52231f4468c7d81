"""Megatron-LM flags that are not supported here, and what to do instead."""

import re

_NEVER = "it has no meaning for pre-training a GPT with superposition"

# (pattern of the whole flag without its dashes, what to do instead); the first match applies.
REFUSED: tuple[tuple[str, str], ...] = (
    (r"superposition-bag-size", "use --tst-bag-size"),
    (r"superposition-ratio", "use --tst-step-ratio"),
    (
        r"train-samples|lr-decay-samples|lr-warmup-samples|phase-transition-iterations",
        "a run is counted in steps: use --train-iters and the other --*-iters flags",
    ),
    (r"rampup-batch-size|decrease-batch-size-if-needed", "the global batch size is constant: use --global-batch-size"),
    (r"lr-warmup-fraction", "use --lr-warmup-iters"),
    (
        r"yaml-cfg|use-legacy-models|use-mcore-models|spec|transformer-impl",
        "use --config; megatron-core's model is always used, and its layers depend on what is installed",
    ),
    (
        r"reset-position-ids|reset-attention-mask",
        "a bag may span two documents, so attention is not split at document ends",
    ),
    (r"mtp-.*", "multi-token prediction does not support bags"),
    (
        r"sft.*|fim-.*|packed-.*|max-seqlen-per-dp-cp-rank|hybrid-context-parallel",
        "packed and rearranged sequences do not support bags",
    ),
    (
        r"calculate-per-token-loss|no-check-for-nan-in-loss-and-grad",
        "it is always on: the loss is the global sum over the global weight",
    ),
    (r"use-rotary-position-embeddings|no-position-embedding", "use --position-embedding-type"),
    (r"squared-relu|quick-geglu|openai-gelu|onnx-safe", "the activations are GELU and --swiglu"),
    (r"fp16.*|loss-scale.*|initial-loss-scale|min-loss-scale|hysteresis", "use --bf16, which needs no loss scale"),
    (
        r"(no-)?(gradient-accumulation|bias-gelu|bias-swiglu|bias-dropout|masked-softmax|rope|persist-layer-norm).*fusion|no-persist-layer-norm|use-flash-attn|attention-backend",
        "the installed libraries determine the fusions, which the log line 'using:' names",
    ),
    (
        r"tokenizer-(?!model$).*|vocab-file|merge-file|vocab-extra-ids|tiktoken-.*|legacy-tokenizer|padded-vocab-size",
        "use --tokenizer-model with a Hugging Face tokenizer.json",
    ),
    (
        r"test-data-path|data-args-path|per-split-data-args-path|mock-data|per-dataset-sequences-path",
        "use --data-path, or --train-data-path and --valid-data-path",
    ),
    (
        r"dataloader-.*|num-dataset-builder-threads|no-mmap-bin-files|no-create-attention-mask-in-dataloader|full-validation",
        "each phase has its own dataloader; see --num-workers and --data-cache-path",
    ),
    (r"no-save-(optim|rng)|save-retain-interval", "a checkpoint always holds all that resuming needs; see --keep-last"),
    (
        r"(use|override)-(checkpoint-)?opt-?_?param-scheduler|use-checkpoint-.*",
        "the run's settings come from --config and flags, not from the checkpoint",
    ),
    (r"exit-signal.*", "SIGTERM and SIGUSR1 always save and stop"),
    (r"pretrained-checkpoint", "use --load with --finetune"),
    (
        r"(dist-)?ckpt-.*|use-(dist-ckpt|persistent-ckpt-worker)|non-persistent-.*|save-.*|verify-integrity|replication.*|enable-experimental|load-main-.*|async-.*",
        "checkpoints are torch_dist, reshardable and written by threads; see --save, --async-save and docs/checkpoints.md",
    ),
    (
        r"wandb-.*|tensorboard-.*|one-logger.*|no-one-logger|log-(?!interval$).*|timing-.*|profile.*",
        "metrics.jsonl has every metric, and TensorBoard and Weights & Biases get the same lines; see --tensorboard-dir and --wandb-project",
    ),
    (
        r"use-(torch-)?fsdp2?|use-megatron-fsdp|data-parallel-sharding-strategy|init-model-with-meta-device|.*-fsdp.*",
        "use --use-distributed-optimizer",
    ),
    (
        r"optimizer|sgd-.*|muon-.*|decoupled-.*|use-precision-aware-optimizer|.*-optimizer-.*|optimizer-.*",
        "the optimizer is AdamW",
    ),
    (
        r"fp8-.*|fp4-.*|first-last-layers-bf16|num-layers-at-(start|end)-in-bf16|te-precision-config-file|kitchen-.*|use-kitchen.*",
        "use --bf16",
    ),
    (
        r"multi-latent-attention|.*-lora-rank|qk-(head|pos-emb-head)-dim|v-head-dim|mamba-.*|hybrid-.*|is-hybrid-model|linear-.*|window-.*|heterogeneous-.*|experimental-.*|dsa-.*",
        "the model is a GPT with standard attention",
    ),
    (
        r"moe-.*|expert-tensor-parallel-size|no-position-.*",
        "--help lists the supported MoE settings",
    ),
    (
        r"local-rank|lazy-mpu-init|distributed-backend|use-tp-pp-dp-mapping|no-scatter-gather-tensors-in-pipeline",
        "ranks come from torchrun's environment",
    ),
    (r"rl-.*|grpo-.*|langrl-.*|inference-.*|perform-rl-step|enable-chunked-prefill|flash-decode|.*prefill.*", _NEVER),
    (
        r"bert-.*|ict-.*|retro-.*|retriever-.*|biencoder-.*|dino-.*|vision-.*|swin-.*|img-.*|encoder-.*|decoder-.*|.*-data-path|mask-.*|short-seq-prob|num-c(lasses|hannels)|patch-dim|classes-fraction|iter-per-epoch|head-lr-mult|block-data-path|embedding-path|indexer-.*",
        _NEVER,
    ),
    (
        r"checkpoint-activations|recompute-activations|distribute-saved-activations|model-parallel-size|batch-size|warmup|no-async-.*",
        "it is an old name; see --help for the current one",
    ),
)


def refusal(flag: str) -> str | None:
    """Return what to do instead of an unsupported Megatron-LM flag, or None if the flag is not among them.

    Args:
        flag: the flag as typed, with its dashes.
    """
    name = flag.lstrip("-").replace("_", "-")
    return next((instead for pattern, instead in REFUSED if re.fullmatch(pattern, name)), None)
