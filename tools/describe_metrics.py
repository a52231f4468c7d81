#!/usr/bin/env python3
"""Print docs/metrics.md, which is generated from the metric classes.

python tools/describe_metrics.py > docs/metrics.md
"""

from megatron_tst.telemetry.describe import describe

if __name__ == "__main__":
    print(describe(), end="")
