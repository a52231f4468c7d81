"""The table of all metrics, from the docstrings of their classes: docs/metrics.md."""

import dataclasses
import inspect
import re

from megatron_tst.telemetry.metrics import ExpertMetrics, SkippedMetrics, StepMetrics, ValidMetrics

KINDS = (StepMetrics, ValidMetrics, ExpertMetrics, SkippedMetrics)
_HEAD = """# Metrics

`metrics.jsonl` in the run directory holds one JSON object per line, of one of these kinds; TensorBoard and Weights &
Biases get the same names. A *data token* is a token of text; a *position* is what the transformer computes: one bag, or
one token. Made by `python tools/describe_metrics.py`.
"""


def describe() -> str:
    """Return docs/metrics.md."""
    sections = [_HEAD]
    for kind in KINDS:
        doc = inspect.getdoc(kind) or ""
        title, _, attributes = doc.partition("Attributes:")
        meanings = dict(re.findall(r"^ +(\w+): ((?:.|\n(?! +\w+: ))+)", attributes, re.MULTILINE))
        rows = [f"| `{field.name}` | {_one_line(meanings[field.name])} |" for field in dataclasses.fields(kind)]
        sections.append("\n".join([f"## {_one_line(title).rstrip('.')}", "", "| name | meaning |", "|---|---|", *rows]))
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")
