import gzip
import json
import re
from pathlib import Path

import pytest
import zstandard

from megatron_tst.config import UserError
from megatron_tst.data.documents import Skipped, list_inputs, read_documents

LINES = [json.dumps({"text": f"document {n}: naïve ☃"}) for n in range(4)]
PACK = {
    "plain.jsonl": lambda data: data,
    "packed.jsonl.gz": gzip.compress,
    "packed.jsonl.zst": zstandard.compress,
}


def texts(files, key="text"):
    skipped = Skipped()
    return [document.text for document in read_documents(files, key, skipped)], skipped


@pytest.mark.parametrize("name", PACK)
def test_json_lines_are_read_plain_and_compressed(tmp_path: Path, name):
    file = tmp_path / name
    file.write_bytes(PACK[name]("\n".join(LINES).encode()))
    found, skipped = texts([file])
    assert found == [json.loads(line)["text"] for line in LINES]
    assert skipped.total == 0


def test_bad_lines_are_skipped_counted_and_named(tmp_path: Path):
    file = tmp_path / "bad.jsonl"
    bad = [
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"{broken",
        b'{"other": 1}',
        b'{"text": 3}',
        b'["text"]',
        b'{"text": ""}',
    ]
    file.write_bytes(b"\n".join([LINES[0].encode(), *bad, b"", LINES[1].encode()]))
    found, skipped = texts([file])
    assert found == [json.loads(line)["text"] for line in LINES[:2]]
    assert skipped.counts == {
        "not UTF-8": 2, "not JSON": 1, "no text under 'text'": 2, "not a JSON object": 1, "empty": 1,
    }  # fmt: skip
    assert skipped.examples[0] == f"{file}:2 (not UTF-8)"


def test_text_file_is_one_document(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text("")
    found, skipped = texts(list_inputs([str(tmp_path)]))
    assert found == ["one\ntwo\n"]
    assert skipped.counts == {"not UTF-8": 1, "empty": 1}


@pytest.mark.parametrize("name", ["in.ndjson", "in.JSONL", "part-00000", "in.txt", "in.Json.GZ", "part-00000.zst"])
def test_json_lines_are_recognised_by_name_or_content(tmp_path: Path, name):
    pack = PACK.get(f"packed.jsonl{Path(name).suffix.lower()}", PACK["plain.jsonl"])
    (tmp_path / name).write_bytes(pack("\n".join(["", " ", *LINES]).encode()))
    found, skipped = texts([tmp_path / name])
    assert found == [json.loads(line)["text"] for line in LINES]
    assert skipped.total == 0


def test_file_named_json_lines_may_begin_with_a_bad_line(tmp_path: Path):
    (tmp_path / "in.NDJSON").write_text("broken\n" + LINES[0])
    (tmp_path / "other").write_text("broken\n" + LINES[0])
    assert texts([tmp_path / "in.NDJSON"])[0] == [json.loads(LINES[0])["text"]]
    assert texts([tmp_path / "other"])[0] == ["broken\n" + LINES[0]]


@pytest.mark.parametrize("text", ["\n\n  indented\n", "{ a = 1 }\n", "[1, 2]\n", "x = {\n  'text': 1}\n"])
def test_text_that_is_not_json_is_one_document(tmp_path: Path, text):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.txt").write_text(text)
    assert texts([tmp_path / "a.txt", tmp_path / "a.txt.gz"])[0] == [text, text]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"content": "one"}\n', "1 no text under 'text'; first: "),
        ('[{"text": "one"}, {"text": "two"}]', "1 not a JSON object; first: "),
        ('[\n{"text": 1}\n]', "2 not JSON, 1 no text under 'text'; first: "),
        ('{"text": ' + "[" * 100_000, "1 not JSON; first: "),
    ],
)
def test_error_states_why_there_are_no_documents(tmp_path: Path, content, reason):
    (tmp_path / "in.json").write_text(content)
    with pytest.raises(UserError, match=f"--input: contains no documents to write: .*: {re.escape(reason)}") as e:
        texts([tmp_path / "in.json"])
    assert "in.json:1" in str(e.value)


def test_directories_are_walked_in_order_with_suffixes_and_exclusions(tmp_path: Path):
    for name in ("b/two.py", "a/one.py", "a/skip/three.py", "a/four.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = list_inputs([str(tmp_path)], (".py",), frozenset({"skip"}))
    assert [file.relative_to(tmp_path).as_posix() for file in found] == ["a/one.py", "b/two.py"]


def test_missing_and_empty_inputs_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        list_inputs([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="--input : does not exist"):
        list_inputs([""])
    with pytest.raises(UserError, match="contains no files"):
        list_inputs([str(tmp_path)], (".py",))
