"""The live display on a terminal, and the plain lines elsewhere."""

import dataclasses
import io
import logging
import re

import pytest

from megatron_tst.telemetry import TrainingProgress, ValidMetrics
from megatron_tst.telemetry.run_directory import start_log_screen
from tests.telemetry.lines import STEP


@pytest.fixture(autouse=True)
def package_logger():
    """Restore the package's logger after a test."""
    logger = logging.getLogger("megatron_tst")
    before, level = list(logger.handlers), logger.level
    yield
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    for handler in before:
        logger.addHandler(handler)
    logger.setLevel(level)


def shown(monkeypatch, is_terminal: bool, visible: bool = True) -> str:
    """Show three steps of the second phase and an evaluation; return the text on standard error, without colors."""
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    start_log_screen()
    with TrainingProgress(20, 2, visible=visible, first_step=7) as progress:
        for step in (8, 9, 10):
            progress.advance(step)
        if visible:
            progress.show_step(dataclasses.replace(STEP, step=10, phase=1, bag_size=1, loss_kind="ce"), 75.0)
            progress.show_valid(ValidMetrics(10, 3.25, None, 800, 200, 2e9, 0.25))
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def test_a_terminal_shows_phase_loss_speed_and_time_left(monkeypatch):
    text = shown(monkeypatch, is_terminal=True)
    last = text.replace("\r", "\n").strip().splitlines()[-1]
    assert re.fullmatch(r"phase 2/2 s=1 ━.* 10/20 ce 3\.5000  4k data tokens/s 0:01:15 left", last.strip())
    # The evaluation is a line above the bar; the step is shown only in the bar.
    assert "step 10/20  validation loss 3.2500" in text
    assert "lr 0.001" not in text


def test_plain_lines_are_shown_without_a_terminal(monkeypatch):
    lines = shown(monkeypatch, is_terminal=False).splitlines()
    assert len(lines) == 2
    assert "step 10/20  phase 2/2  s=1  ce 3.5000  4k data tokens/s  lr 0.001" in lines[0]
    assert lines[0].endswith("0:01:15 left")


def test_other_ranks_show_nothing(monkeypatch):
    assert shown(monkeypatch, is_terminal=True, visible=False) == ""
