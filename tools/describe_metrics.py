#!/usr/bin/env python3
"""Print docs/metrics.md, from the docstrings of the metrics.

python tools/describe_metrics.py > docs/metrics.md
"""

from megatron_tst.telemetry.describe import describe

if __name__ == "__main__":
    print(describe(), end="")
