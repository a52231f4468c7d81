"""Every row of the table of starts in docs/checkpoints.md is set up, started and compared with its outcome."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_tst.config import UserError
from tests.training.runs import ROOT, arguments, build_here, train_here

RUN = "--tst-bag-size 4 --tst-steps 4 --save-interval 3 --eval-iters 0"
TRACKER = "latest_checkpointed_iteration.txt"
OUTCOME = re.compile(
    r"(?:refused: `(?P<refusal>.+)`|(?:begins at step (?P<first>0)(?: with the weights of step (?P<weights>\d+))?"
    r"|continues from step (?P<step>\d+)(?P<fresh> with fresh optimizer state)?)(?:; says `(?P<line>.+)`)?)"
)


@dataclass(frozen=True)
class Row:
    """One row of the table: the files that exist, the flags and the outcome."""

    checkpoints: str
    tracker: str
    flags: str
    outcome: str


def read_table() -> list[Row]:
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    section = text.partition("## What a start does")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]


ROWS = read_table()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def saved(here, corpus, tokenizer, folder: Path) -> Path:
    """The folder of a finished run, trained once for all rows."""
    if not (folder / "RUN").exists():
        train_here(arguments(corpus, str(tokenizer.path), folder / "RUN", RUN))
    return folder / "RUN"


def lay_out(row: Row, saved: Path, run: Path) -> None:
    """Create the run directory RUN with the checkpoints and the tracker of a row."""
    run.mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        shutil.copy(saved / name, run / name)
    folder = run / "checkpoints"
    folder.mkdir()
    for step, state in re.findall(r"(\d+)( damaged| of Megatron-LM)?", row.checkpoints):
        name = f"iter_{int(step):07d}"
        shutil.copytree(saved / "checkpoints" / name, folder / name, copy_function=os.link)
        if "damaged" in state:
            # Only the checksums notice this change.
            written = (folder / name / "run_state.json").read_text()
            (folder / name / "run_state.json").unlink()
            (folder / name / "run_state.json").write_text(written + "\n")
        for ours in ("run_state.json", "config.yaml", "SHA256SUMS") if "Megatron-LM" in state else ():
            (folder / name / ours).unlink()
    if row.tracker != "missing":
        (folder / TRACKER).write_text("" if row.tracker == "nothing" else row.tracker)


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "run.lock")


def check(row: Row, start, run_folder: Path, lines) -> None:
    """Start as in a row, and compare the result with the row's outcome."""
    wanted = OUTCOME.fullmatch(row.outcome)
    assert wanted, row.outcome
    places = {"RUN": run_folder, "D": run_folder / "checkpoints", "S": run_folder.parent / "S"}
    flags = re.sub(r"(?<= )(RUN|D|S)\b", lambda name: str(places[name[1]]), row.flags.strip("`"))
    if wanted["refusal"]:
        before = names_in(run_folder.parent)
        with pytest.raises(UserError) as refused:
            start(flags)
        assert wanted["refusal"] in str(refused.value)
        assert names_in(run_folder.parent) == before
        return
    run = start(flags)
    run.directory.leave()
    loaded = re.search(r"loaded \S+/iter_0*(\d+):", lines())
    source = wanted["weights"] or wanted["step"]
    assert (loaded and loaded[1]) == source
    assert run.first_step == int(wanted["first"] or wanted["step"])
    has_state = bool(run.stepper.train_state.optimizer.state_dict()["state"])
    assert has_state == (wanted["step"] is not None and not wanted["fresh"])
    assert (wanted["line"] or "") in lines()


@pytest.fixture
def start(here, corpus, tokenizer, tmp_path: Path):
    def build(flags: str):
        return build_here(arguments(corpus, str(tokenizer.path), tmp_path / "new", f"{RUN} {flags}"))

    return build


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.checkpoints}, {row.tracker}, {row.flags.strip('`')}")
def test_each_start_has_the_outcome_in_the_table(row, saved, start, tmp_path, caplog):
    caplog.set_level("INFO", "megatron_tst")
    lay_out(row, saved, tmp_path / "RUN")
    check(row, start, tmp_path / "RUN", lambda: caplog.text)


def test_every_flag_that_a_start_reads_is_in_the_table():
    flags = {flag for row in ROWS for flag in re.findall(r"--[a-z-]+", row.flags)}
    assert flags >= {
        "--load", "--save", "--finetune", "--ckpt-step", "--exit-on-missing-checkpoint", "--no-load-optim",
        "--no-load-rng", "--override-run-config", "--no-verify-checkpoint",
    }  # fmt: skip
    assert len(set(ROWS)) == len(ROWS) >= 40


@pytest.mark.parametrize(
    "outcome",
    ["continues from step 6", "begins at step 0", "begins at step 0 with the weights of step 8", "refused: `names`",
     "continues from step 8 with fresh optimizer state", "continues from step 8; says `starts from scratch`"],
)  # fmt: skip
def test_a_wrong_outcome_fails_the_check(saved, start, tmp_path, caplog, outcome):
    caplog.set_level("INFO", "megatron_tst")
    row = Row("3, 6, 8", "8", "`--load D`", outcome)
    lay_out(row, saved, tmp_path / "RUN")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(row, start, tmp_path / "RUN", lambda: caplog.text)
