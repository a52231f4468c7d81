"""Fast encoding by the library fastokens, for tokenizers for which it gives the same ids as ``tokenizers``."""

import json
from typing import Any

import fastokens
import tokenizers
from tokenizers import Regex, pre_tokenizers

# The regular expressions by which these families split text into pieces, which are merged separately; ByteLevel itself
# splits like GPT-2. tests/data/test_fast_encoder.py compares the splits of the two libraries for each family.
SPLITS: dict[str, tuple[str, ...]] = {
    "GPT-2": (),
    "GPT-4, Llama 3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "Qwen 2, Qwen 3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "GPT-4o, gpt-oss": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
NORMALIZERS: tuple[dict[str, str] | None, ...] = (None, {"type": "NFC"})
# After an apostrophe, tokenizers matches this letter as the contraction 's, ignoring case; fastokens does not.
LONG_S = "\u017f"


def split_bytes(splits: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer that splits by each regular expression, or like GPT-2 if there is none, into bytes."""
    if not splits:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def find_fast_encoder(model: tokenizers.Tokenizer) -> fastokens.Tokenizer | None:
    """Return an encoder that gives the model's own ids for every text without ``LONG_S``, or None if none is known.

    An encoder is known for byte-level BPE with one of ``SPLITS``. The code path of fastokens depends on the processor,
    so the ids for the text of the whole vocabulary are compared here.
    """
    if not is_known(json.loads(model.to_str())):
        return None
    encoder = fastokens.Tokenizer.from_json_str(model.to_str())
    vocabulary = model.decode(range(model.get_vocab_size()), skip_special_tokens=False).replace(LONG_S, "")
    same = encoder.encode(vocabulary).ids == model.encode(vocabulary, add_special_tokens=False).ids
    return encoder if same else None


def is_known(pipeline: dict[str, Any]) -> bool:
    """Return whether the two libraries are known to give the same ids.

    Args:
        pipeline: the content of a ``tokenizer.json``.
    """
    model = pipeline["model"]
    special = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    return (
        model["type"] == "BPE"
        and not any(model[key] for key in special)
        and model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())
        and pipeline["normalizer"] in NORMALIZERS
        and pipeline["truncation"] is pipeline["padding"] is None
        and any(_steps(pipeline["pre_tokenizer"]) == _steps(_written(splits)) for splits in SPLITS.values())
    )


def _written(splits: tuple[str, ...]) -> dict[str, Any]:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = split_bytes(splits)
    written: dict[str, Any] = json.loads(model.to_str())["pre_tokenizer"]
    return written


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    # trim_offsets affects offsets into the text, not ids.
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
