from dataclasses import fields
from pathlib import Path

from megatron_tst.telemetry.describe import describe
from megatron_tst.telemetry.metrics import KINDS

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_document_is_up_to_date():
    assert DOCUMENT.read_text(encoding="utf-8") == describe(), "python tools/describe_metrics.py > docs/metrics.md"


def test_every_metric_is_described():
    tables = describe().split("\n## ")[1:]
    for kind, table in zip(KINDS, tables, strict=False):
        rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| `")]
        assert [name.strip("| `") for name, *_ in rows] == [field.name for field in fields(kind)]
        assert all(len(row) == 4 and row[2] for row in rows)


def test_the_flops_formula_is_included():
    assert "head         2 L D V\n```" in describe()
