import json
import pickle
import shutil
from pathlib import Path

import pytest
import tokenizers

from megatron_tst.config import UserError
from megatron_tst.data.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_bpe


def test_tokenizer_is_read_from_a_file_or_its_directory(tokenizer):
    for name in (tokenizer.path, tokenizer.path.parent):
        again = load_tokenizer(str(name))
        assert (again.vocab_size, again.eod) == (tokenizer.vocab_size, tokenizer.eod) == (300, 0)


def test_decoding_restores_the_encoded_text(tokenizer):
    text = "naïve ☃ \x00 \t def f(x):\n"
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(tokenizer):
    sizes = tokenizer.token_bytes()
    for text in ("naïve ☃ \x00 \t def f(x):\n", "日本語 🙂🙂", "plain"):
        ids = tokenizer.encode_batch([text])[0]
        assert sum(sizes[number] for number in ids) == len(text.encode())
    assert sizes[tokenizer.eod] == 0
    assert max(sizes) > 1


def test_added_word_has_the_bytes_of_its_text(tmp_path: Path, tokenizer):
    library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    library.add_tokens(["größer"])
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).token_bytes()[-1] == 8


def test_bytes_of_tokens_are_unknown_if_the_decoder_uses_context(tmp_path: Path, tokenizer):
    library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    library.decoder = tokenizers.decoders.Metaspace()
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).token_bytes() is None


def test_configured_end_of_sequence_has_precedence(tmp_path: Path, tokenizer):
    shutil.copy(tokenizer.path, tmp_path)
    assert load_tokenizer(str(tmp_path)).eod == 0
    end = tokenizers.Tokenizer.from_file(str(tokenizer.path)).id_to_token(65)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": end}}))
    assert load_tokenizer(str(tmp_path)).eod == 65


def test_smallest_vocabulary_is_bytes_and_end_of_document(tmp_path: Path):
    assert train_bpe(["abc"], 257, tmp_path / "t.json").vocab_size == 257
    with pytest.raises(UserError, match="--tst-train-bpe 256: must be at least 257"):
        train_bpe(["abc"], 256, tmp_path / "t.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as JSON"),
        ("{" * 100_000, "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "must be a JSON object, not list"),
        ("null", "must be a JSON object, not NoneType"),
        ('{"eos_token": 5}', "eos_token 5: must be a token's text"),
        ('{"eos_token": []}', r"eos_token \[\]: must be"),
        ('{"eos_token": {"content": 5}}', 'eos_token {"content": 5}: must be'),
    ],
)
def test_malformed_configuration_is_refused(tmp_path: Path, tokenizer, content, message):
    shutil.copy(tokenizer.path, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=f"--tokenizer-model .*tokenizer_config.json: {message}") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_configuration_may_name_no_end_of_sequence(tmp_path: Path, tokenizer):
    shutil.copy(tokenizer.path, tmp_path)
    for content in ("{}", '{"eos_token": null}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        assert load_tokenizer(str(tmp_path)).eod == tokenizer.eod


@pytest.mark.parametrize("stored", ["truncation", "padding"])
def test_stored_truncation_and_padding_are_switched_off(tmp_path: Path, tokenizer, stored):
    library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    texts = ["def f(x):\n    return x\n" * 20, "short"]
    wanted = [encoding.ids for encoding in library.encode_batch(texts)]
    if stored == "truncation":
        library.enable_truncation(16)
    else:
        library.enable_padding(pad_id=1, pad_token="x")
    library.save(str(tmp_path / "tokenizer.json"))
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [encoding.ids for encoding in again.encode_batch(texts)] != wanted
    ours = load_tokenizer(str(tmp_path))
    for loaded in (ours, pickle.loads(pickle.dumps(ours))):
        assert loaded.encode_batch(texts) == wanted
        assert loaded.encode_flat(texts)[0].tolist() == [number for ids in wanted for number in ids]
    assert ours.fast_encoder is not None


class _Bomb:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_nothing_in_a_tokenizers_files_is_executed(tmp_path: Path, tokenizer, name):
    shutil.copy(tokenizer.path, tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(_Bomb(tmp_path / "canary")))
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "canary").exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=r"--tokenizer-model .*(must be a|cannot be read)"):
        load_tokenizer(str(file))


def test_tokenizer_without_end_of_document_is_refused(tmp_path: Path, tokenizer):
    content = json.loads(tokenizer.path.read_text())
    text = json.dumps(content).replace(END_OF_DOCUMENT, "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="has no end-of-document token"):
        load_tokenizer(str(tmp_path))
