"""fastokens and tokenizers split text at the same places.

Most vocabularies do not show where a text is split, because they merge nothing across that place. In the vocabulary of
these tests any two bytes merge, so that a split at another place gives other ids.
"""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from megatron_tst.data import fast_encoder
from megatron_tst.data.fast_encoder import LONG_S, SPLITS, find_fast_encoder, is_known, split_bytes
from megatron_tst.data.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer
from tests.corpora import FILES

WORDS = [
    "the", " the", "don't", "I'LL", "'S", "'K", "'", "x'", "a", "é", "e\u0301", "ﬁ", "Å", "\u2126", "\u0344", "ß", "ẞ",
    "İ", "\u0131", "ǅ", "ʰ", "\u0903", "\U0001d518", "𐐀", "日本", "한국어", "\u1100\u1161\u11a8",
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "\ufe0f", "\u0300" * 5,
    "q\u0307\u0323", "12345", "٣٤", "½", "ⅷ", ".", "...", "!?", "_", "//", "\\", "http://x.y/z?a=b", "camelCase",
    "HTTPServer", "x" * 50, "\n", "\r\n", "\r", "\t", " ", "  ", "   ", "\u00a0", "\u2028", "\u3000", "\u200b", "\x85",
    "\x1c", "\x00", "\U0010ffff", "\ue000", END_OF_DOCUMENT, "<|endoftext", "|>",
]  # fmt: skip
LONG = ["", "a" * 50_000, "日本" * 20_000, " " * 40_000, "\n" * 20_000, "x y " * 20_000, "1" * 20_000]


def mixtures(seed: int, count: int) -> list[str]:
    """Return texts of random words, of random ASCII characters, and of random characters of all planes."""
    drawn = random.Random(seed)
    planes = (0x80, 0x800, 0xD800, 0x110000)

    def character() -> str:
        code = drawn.randrange(drawn.choice(planes))
        return "" if 0xD800 <= code < 0xE000 else chr(code)

    makers = (lambda: drawn.choice(WORDS), lambda: chr(drawn.randrange(0x80)), character)
    texts = ["".join(maker() for _ in range(drawn.choice((1, 3, 10, 50, 400)))) for maker in makers * (count // 3)]
    return [text.replace(LONG_S, "") for text in texts]


def in_contexts(codes: range) -> list[str]:
    """Return texts with each code point next to letters, digits, marks, spaces, newlines, apostrophes and itself."""
    surrogates, characters = range(0xD800, 0xE000), (code for code in codes if chr(code) != LONG_S)
    return [
        "a{0}1{0}.{0} {0}\n{0}a '{0}a{0}{0} 1{0}".format(chr(code)) for code in characters if code not in surrogates
    ]


@pytest.fixture(scope="module")
def all_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary of all bytes and all pairs of bytes, and its merges in random order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(first, second) for first in alphabet for second in alphabet]
    random.Random(0).shuffle(pairs)
    return {token: number for number, token in enumerate([*alphabet, *map("".join, pairs)])}, pairs


def revealing(all_pairs, splits: tuple[str, ...], normalizer=None) -> tokenizers.Tokenizer:
    vocabulary, pairs = all_pairs
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    model.pre_tokenizer, model.decoder = split_bytes(splits), tokenizers.decoders.ByteLevel()
    if normalizer:
        model.normalizer = normalizer
    model.add_special_tokens([END_OF_DOCUMENT])
    return model


def ids(model, texts: list[str]) -> list[list[int]]:
    return [model.encode(text, add_special_tokens=False).ids for text in texts]


def flat(model: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids that our tokenizer gives each text."""
    flat_ids, lengths = Tokenizer(Path(), model, 0).encode_flat(texts)
    rest = iter(flat_ids.tolist())
    return [[next(rest) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["as it is", "NFC"])
@pytest.mark.parametrize("family", SPLITS)
def test_libraries_split_text_alike(all_pairs, family, normalizer):
    model = revealing(all_pairs, SPLITS[family], normalizer)
    assert find_fast_encoder(model) is not None
    texts = mixtures(1, 1500) + LONG + in_contexts(range(0x3400)) + in_contexts(range(0xA000, 0x110000, 97))
    assert [text for text, ours, theirs in zip(texts, flat(model, texts), ids(model, texts), strict=True)
            if ours != theirs] == []  # fmt: skip


def test_another_split_gives_other_ids(all_pairs):
    one, other = (revealing(all_pairs, SPLITS[family]) for family in ("GPT-4, Llama 3", "Qwen 2, Qwen 3"))
    assert ids(one, ["12345"]) != ids(other, ["12345"])
    texts = mixtures(1, 300)
    assert ids(find_fast_encoder(one), texts) != ids(other, texts)


@pytest.mark.parametrize("family", SPLITS)
def test_text_with_a_long_s_is_encoded_by_tokenizers(all_pairs, family):
    model = revealing(all_pairs, SPLITS[family])
    texts = ["'\u017fx", "x'\u017fx", "Wa\u017f\u017fer", "plain"]
    assert flat(model, texts) == ids(model, texts)
    if "'s" in "".join(SPLITS[family]):
        assert ids(find_fast_encoder(model), texts) != ids(model, texts)


def test_libraries_find_added_tokens_alike(tokenizer):
    model = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    model.add_special_tokens(["<|im_start|>", "<|im"])
    kinds = [("foo", {"lstrip": True}), ("the", {"rstrip": True}), ("a", {"single_word": True}), ("é", {}), ("  ", {})]
    model.add_tokens([AddedToken(content, **flags) for content, flags in kinds])
    texts = [*mixtures(2, 600), "<|im_start|>the foo a a<|im>  é"]
    assert flat(model, texts) == ids(model, texts)
    assert find_fast_encoder(model) is not None
    assert ids(model, texts) != ids(tokenizers.Tokenizer.from_file(str(tokenizer.path)), texts)


def test_libraries_encode_real_text_alike(tokenizer):
    model = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    texts = [Path(file).read_text(encoding="utf-8") for file in FILES] + mixtures(3, 600)
    for change in ({}, {"ignore_merges": True}):
        changed = json.loads(model.to_str())
        changed["model"].update(change)
        again = tokenizers.Tokenizer.from_str(json.dumps(changed))
        assert find_fast_encoder(again) is not None
        assert flat(again, texts) == ids(again, texts)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}},
        {"model": {"dropout": 0.1}},
        {"model": {"byte_fallback": True}},
        {"model": {"type": "WordPiece"}},
        {"model": {"vocab": {"a": 0}}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"add_prefix_space": True}},
        {"pre_tokenizer": {"use_regex": False}},
    ],
    ids=str,
)
def test_unknown_pipeline_is_not_encoded_by_fastokens(tokenizer, change):
    pipeline = json.loads(tokenizers.Tokenizer.from_file(str(tokenizer.path)).to_str())
    assert is_known(pipeline)
    for part, value in change.items():
        merges = isinstance(value, dict) and isinstance(pipeline[part], dict)
        pipeline[part] = {**pipeline[part], **value} if merges else value
    assert not is_known(pipeline)


def test_processor_on_which_the_libraries_differ_is_detected(tmp_path: Path, tokenizer, monkeypatch):
    model = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    other = json.loads(model.to_str())
    other["model"]["merges"].pop()
    wrong = fast_encoder.fastokens.Tokenizer.from_json_str(json.dumps(other))
    assert find_fast_encoder(model) is not None

    class Wrong:
        from_json_str = staticmethod(lambda _: wrong)

    monkeypatch.setattr(fast_encoder.fastokens, "Tokenizer", Wrong)
    assert find_fast_encoder(model) is None
    texts = [Path(file).read_text(encoding="utf-8") for file in FILES]
    ours, lengths = load_tokenizer(str(tokenizer.path)).encode_flat(texts)
    assert ours.tolist() == [number for text in ids(model, texts) for number in text]
    assert lengths.tolist() == [len(text) for text in ids(model, texts)]
