#!/usr/bin/env python3
"""Estimate a run before it starts: data tokens, FLOPs, hours, memory per GPU and the parallel layouts that fit.

python tools/plan.py --config launch/configs/moe_10b_tst.yaml --gpu b200 --num-gpus 64 [flags of pretrain_tst.py]
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_tst.config import EXIT_CODE, UserError, read_config, write_json
from megatron_tst.planning import report
from megatron_tst.planning.layouts import USABLE_MEMORY, Layout, distinct, judge_layout, recomputations, search_layouts
from megatron_tst.planning.plan import complete, find_speed, make_plan
from megatron_tst.planning.published import advise
from megatron_tst.planning.scale import Assumptions, scale_run
from megatron_tst.planning.step_time import calibrate
from megatron_tst.shape.hardware import GPUS, find_gpu
from megatron_tst.telemetry.outputs import check_output, writing_output


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read this program's flags; all other flags are those of pretrain_tst.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gpu", default="b200", help=f"one of {', '.join(GPUS)} (default: b200)")
    parser.add_argument("--num-gpus", type=int, default=64, help="(default: 64)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--mfu", type=float, help="fraction of the peak (default: the paper's for a similar model)")
    speed.add_argument("--measured", type=Path, metavar="RUN", help="run directory whose speed to take")
    parser.add_argument("--price-per-gpu-hour", type=float, help="price for an estimate of the cost")
    parser.add_argument(
        "--data-tokens", type=float, help="available data tokens, for advice on bag size and step ratio"
    )
    parser.add_argument(
        "--usable-memory", type=float, default=USABLE_MEMORY, help="usable fraction of a GPU's memory (default: 0.9)"
    )
    parser.add_argument("--layouts", type=int, default=5, metavar="N", help="number of fastest layouts to print")
    parser.add_argument(
        "--simulate", type=int, nargs="+", default=[], metavar="N", help="estimate the same run on N GPUs"
    )
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    return parser.parse_known_args()


def main(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Print the plan."""
    gpu, number, usable = find_gpu(arguments.gpu), arguments.num_gpus, arguments.usable_memory
    for flag, count in (("--num-gpus", number), *(("--simulate", count) for count in arguments.simulate)):
        if count < 1:
            raise UserError(f"{flag} {count}: must be at least 1")
    if not 0 < usable <= 1:
        raise UserError(f"--usable-memory {usable:g}: must lie between 0 and 1")
    if not arguments.layouts > 0:
        raise UserError(f"--layouts {arguments.layouts}: must be at least 1")
    for flag, amount in (
        ("--price-per-gpu-hour", arguments.price_per_gpu_hour), ("--data-tokens", arguments.data_tokens)
    ):  # fmt: skip
        if amount is not None and not 0 < amount < math.inf:
            raise UserError(f"{flag} {amount:g}: must be above 0")
    if arguments.json:
        check_output(arguments.json, "--json")
    config = complete(read_config(argv), number)
    speed = find_speed(config, gpu, arguments.mfu, arguments.measured)
    plan = make_plan(config, gpu, number, speed)
    chosen = judge_layout(config, gpu, number, speed.mfu, usable)
    efficiency = calibrate(config, gpu, number, speed.mfu) if chosen.step else speed.mfu
    chosen = judge_layout(config, gpu, number, efficiency, usable)
    recomputed = [judge_layout(way, gpu, number, efficiency, usable) for way in recomputations(config)]
    fitting, others = search_layouts(config, gpu, number, efficiency, usable)
    limit = float("inf") if arguments.data_tokens is None else arguments.data_tokens / plan.positions
    found_advice = advise(config.model, plan.num_steps, limit)
    assumptions = Assumptions()
    scaled = [scale_run(config, gpu, count, efficiency, usable, assumptions) for count in arguments.simulate]
    for part in (
        *report.describe_run(plan, gpu, number, arguments.price_per_gpu_hour),
        *report.describe_memory(chosen, gpu, usable),
        *report.describe_recomputation(recomputed),
        *report.describe_layouts(chosen, distinct(fitting)[: arguments.layouts], others, efficiency, plan),
        *report.describe_advice(found_advice, plan, arguments.data_tokens),
        *(report.describe_scaled(scaled, assumptions) if scaled else ()),
    ):
        Console().print(part, highlight=False, soft_wrap=isinstance(part, str), markup=False)
    if arguments.json:
        content = {
            "plan": dataclasses.asdict(plan),
            "layout": _as_json(chosen),
            "recomputation": [_as_json(layout) for layout in recomputed],
            "fitting": [_as_json(layout) for layout in fitting],
            "not_fitting": [_as_json(layout) for layout in others],
            "advice": [{**dataclasses.asdict(advice), "data_ratio": advice.data_ratio} for advice in found_advice],
            "assumptions": dataclasses.asdict(assumptions),
            "scaled": [{**vars(run), "layout": run.layout and _as_json(run.layout)} for run in scaled],
        }
        with writing_output(arguments.json, "--json"):
            arguments.json.write_text(write_json(content, indent=2) + "\n", encoding="utf-8")


def _as_json(layout: Layout) -> dict[str, Any]:
    return {
        "name": layout.name,
        "refusal": layout.refusal,
        "memory_bytes": [dataclasses.asdict(stage) for stage in layout.memory],
        "step_s": layout.step and dataclasses.asdict(layout.step),
    }


if __name__ == "__main__":
    try:
        main(*parse_arguments())
    except UserError as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
