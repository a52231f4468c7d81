"""Bits per byte, compared with the bytes of the text itself."""

import math
from pathlib import Path

import pytest
import tokenizers
import torch

from megatron_tst.training import evaluate
from tests.training.runs import arguments, build_here


@pytest.mark.parametrize("extra", ["", "--eod-mask-loss"])
def test_bits_per_byte_divide_the_loss_by_the_bytes_of_the_text(here, corpus, tokenizer, tmp_path: Path, extra):
    run = build_here(arguments(corpus, str(tokenizer.path), tmp_path / "run", extra))
    found = evaluate(run)
    reader = run.read(run.data.valid, run.validation, num_workers=0)
    library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    targets, num_bytes = 0, 0
    for _ in range(run.validation.num_steps):
        for batch in run.read_step(reader, run.validation.phases[0]):
            for labels in batch.labels:
                valid = labels[labels != -100].tolist()
                targets += len(valid)
                # With --eod-mask-loss the token after a document's end is no target, so the ids may not join to text.
                num_bytes += sum(len(library.decode([token])) for token in valid)
    assert num_bytes > 1.2 * targets
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) * targets / num_bytes, rel=1e-6)
    run.directory.leave()


def test_bits_per_byte_are_none_if_token_bytes_are_unknown(here, corpus, tokenizer, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "token_bytes", lambda _: None)
    run = build_here(arguments(corpus, str(tokenizer.path), tmp_path / "run"))
    found = evaluate(run)
    assert found.bits_per_byte is None
    assert torch.isfinite(torch.tensor(found.loss))
    run.directory.leave()
