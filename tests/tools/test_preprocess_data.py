import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_tst.data.tokenizer import load_tokenizer
from tests.training.runs import ROOT, real_text, start


def run(folder: Path, *extra: str, **env: str):
    files = ("--output-prefix", str(folder / "out"), "--tokenizer-model", str(folder / "tokenizer.json"))
    return start("tools/preprocess_data.py", *files, *extra, **env)


def test_one_command_encodes_a_folder_of_real_text(tmp_path: Path):
    text = real_text(tmp_path / "text")[0]
    (tmp_path / "text" / "broken.py").write_bytes(b"\xff")
    (tmp_path / "text" / "notes.md").write_text("left out by its suffix")
    done = run(tmp_path, "--input", text, "--tst-suffixes", ".py", "--tst-train-bpe", "300", "--append-eod",
               "--workers", "2", "--tst-shuffle-files", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "30 documents" in done.stdout
    assert "skipped 1 documents: 1 not UTF-8" in done.stdout
    indexed, tokenizer = IndexedDataset(str(tmp_path / "out_text_document")), load_tokenizer(str(tmp_path))
    assert len(indexed) == 30
    assert all(document[-1] == tokenizer.eod for document in indexed)
    decoded = sorted(tokenizer.decode(document[:-1].tolist()) for document in indexed)
    assert decoded == sorted(file.read_text() for file in Path(text).glob("*.py") if file.name != "broken.py")


def test_json_keys_selects_the_text(tmp_path: Path, tokenizer):
    (tmp_path / "in.jsonl").write_text('{"content": "one"}\n{"content": "two"}\nbroken\n')
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    done = run(tmp_path, "--input", str(tmp_path / "in.jsonl"), "--json-keys", "content")
    assert done.returncode == 0, done.stderr
    assert "in.jsonl:3 (not JSON)" in done.stdout
    assert len(IndexedDataset(str(tmp_path / "out_content_document"))) == 2


def test_mistakes_print_one_line_and_leave_no_files(tmp_path: Path, tokenizer):
    (tmp_path / "empty.jsonl").write_text("broken\n")
    for extra, message in (
        (("--input", str(tmp_path / "nowhere")), "nowhere: does not exist"),
        (("--input", str(tmp_path / "empty.jsonl")), "--tokenizer-model"),
        (("--input", str(tmp_path / "empty.jsonl"), "--workers", "0"), "--workers 0: must be at least 1"),
    ):
        done = run(tmp_path, *extra)
        assert done.returncode == 2
        assert done.stderr.startswith("preprocess_data.py: error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    done = run(tmp_path, "--input", str(tmp_path / "empty.jsonl"))
    assert done.returncode == 2 and "contains no documents" in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_learned_tokenizer_needs_a_file_name(tmp_path: Path):
    (tmp_path / "text").write_text("one")
    (tmp_path / "folder").mkdir()
    learning = ("--input", str(tmp_path / "text"), "--tst-train-bpe", "300", "--tokenizer-model")
    for place, message in (("folder", "is a folder; with --tst-train-bpe, name the file to write"),
                           ("text/tokenizer.json", "cannot be written")):  # fmt: skip
        done = run(tmp_path, *learning, str(tmp_path / place))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"--tokenizer-model {tmp_path / place}: {message}" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "text"]
    assert not any((tmp_path / "folder").iterdir())


def test_a_locale_without_utf8_is_refused(tmp_path: Path):
    """Python uses UTF-8 in the C locale unless PYTHONUTF8 and PYTHONCOERCECLOCALE disable it."""
    (tmp_path / "é").write_text("é")
    learning = ("--input", str(tmp_path / "é"), "--tst-train-bpe", "300")
    done = run(tmp_path, *learning, LC_ALL="C", PYTHONUTF8="0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "LC_ALL: the locale's encoding is ascii, but must be UTF-8: set PYTHONUTF8=1" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["é"]
    assert run(tmp_path, *learning, LC_ALL="C").returncode == 0


def test_a_second_process_is_refused_and_a_signal_stops_the_first(tmp_path: Path, tokenizer):
    """The first process waits for a writer of its input; a second one starts, and a signal stops the first."""
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    (tmp_path / "text").write_text("one")
    os.mkfifo(tmp_path / "pipe")
    files = ("--output-prefix", str(tmp_path / "out"), "--tokenizer-model", str(tmp_path / "tokenizer.json"))
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(tmp_path / "pipe"), *files]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as first:
        try:
            # Opening the pipe for writing blocks until the tool opens it for reading, after it has locked its output.
            opened: list[int] = []
            writer = threading.Thread(
                target=lambda: opened.append(os.open(tmp_path / "pipe", os.O_WRONLY)), daemon=True
            )
            writer.start()
            writer.join(timeout=900)
            assert opened
            second = run(tmp_path, "--input", str(tmp_path / "text"))
            assert second.returncode == 2 and "out: another process is writing it" in second.stderr
            first.send_signal(signal.SIGTERM)
            _, told = first.communicate(timeout=900)
        finally:
            first.kill()
    os.close(opened[0])
    assert first.returncode == 143
    assert told == "preprocess_data.py: stopped by SIGTERM: no corpus was written\n"
    assert not list(tmp_path.glob("out*"))
