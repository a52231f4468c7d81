"""The table of all metrics, from the fields of their classes: docs/metrics.md."""

import dataclasses
import inspect
from typing import get_type_hints

from megatron_tst.shape.flops import forward_flops_per_sequence
from megatron_tst.telemetry.metrics import KINDS, About

_HEAD = """# Metrics

`metrics.jsonl` in the run directory holds one JSON object per line; its `kind` says which of the following it is.
TensorBoard and Weights & Biases get the same names. A *data token* is a token of text; a *position* is what the
transformer computes: one bag, or one token. L positions make a sequence, s data tokens a bag. What has no unit is a
pure number. JSON has no word for a number that is not finite: it is written as null, and a field `not_finite` holds it
as a word, `{"valid_loss": "nan"}`.
Made by `python tools/describe_metrics.py`.
"""
_FLOPS = """## FLOPs per step

Three times the forward pass, in every phase: the backward pass multiplies once more for the inputs and once more for
the weights. Per sequence, with L positions, hidden D, heads H of width E, K key-value heads, inner width F, N experts,
vocabulary V (padded); look-ups, norms, activations and the loss are not counted:
"""


def describe() -> str:
    """Return docs/metrics.md."""
    sections = [_HEAD]
    for kind in KINDS:
        hints = get_type_hints(kind, include_extras=True)
        rows = [_row(field.name, hints[field.name].__metadata__[0]) for field in dataclasses.fields(kind)]
        title = (inspect.getdoc(kind) or "").split(".")[0]
        rest = (inspect.getdoc(kind) or "").removeprefix(f"{title}.").strip()
        table = ["| name | unit | meaning | formula |", "|---|---|---|---|", *rows]
        sections.append(
            "\n\n".join(
                [f"## `{kind.kind}`: {title[0].lower()}{title[1:]}", *([rest] if rest else []), "\n".join(table)]
            )
        )
    formula = (inspect.getdoc(forward_flops_per_sequence) or "").split("::\n\n")[1].split("\n\n")[0]
    sections.append(f"{_FLOPS}\n```\n{inspect.cleandoc(formula)}\n```")
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _row(name: str, about: About) -> str:
    return f"| `{name}` | {about.unit} | {about.meaning} | {about.formula} |"
