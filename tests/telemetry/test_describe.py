from dataclasses import fields
from pathlib import Path

from megatron_tst.telemetry.describe import KINDS, describe

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_document_is_the_code():
    assert DOCUMENT.read_text(encoding="utf-8") == describe(), "python tools/describe_metrics.py > docs/metrics.md"


def test_every_metric_is_described():
    text = describe()
    for kind in KINDS:
        for field in fields(kind):
            (row,) = [line for line in text.splitlines() if line.startswith(f"| `{field.name}` |")][:1]
            assert len(row) > len(f"| `{field.name}` | x |")
