from pathlib import Path

import pytest

from megatron_tst.analysis.same_steps import Step, differing, largest_difference, read_steps
from megatron_tst.config import UserError

LINES = (
    '{"kind": "step", "step": 1, "loss": 3.0, "grad_norm": 0.5, "lr": 0.001}\n'
    '{"step": 1, "valid_loss": 2.5}\n'
    '{"kind": "switch", "step": 2}\n'
    '{"step": 2, "loss": 2.0, "grad_norm": 0.25, "lr": 0.002}\n'
)
FIGURES = [
    Step(1, "loss", 3.0), Step(1, "grad_norm", 0.5), Step(1, "lr", 0.001), Step(1, "valid_loss", 2.5),
    Step(2, "loss", 2.0), Step(2, "grad_norm", 0.25), Step(2, "lr", 0.002),
]  # fmt: skip


def test_figures_come_in_the_order_of_steps_from_lines_of_any_age(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(LINES)
    assert read_steps(tmp_path / "metrics.jsonl") == FIGURES


def test_a_run_without_a_step_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="has no logged step"):
        read_steps(tmp_path / "metrics.jsonl")


def test_equal_runs_do_not_differ():
    assert differing(FIGURES, list(FIGURES)) == []
    assert largest_difference(FIGURES, list(FIGURES)) == 0


def test_the_last_bit_is_a_difference():
    other = [*FIGURES[:4], Step(2, "loss", 2.0000000000000004), *FIGURES[5:]]
    assert differing(FIGURES, other) == [4]
    assert 0 < largest_difference(FIGURES, other) < 1e-15


def test_steps_that_only_one_run_has_are_differences():
    assert differing(FIGURES, FIGURES[:5]) == [5, 6]
