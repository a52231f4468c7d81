"""Formats a plan as tables and sentences for a terminal."""

from collections.abc import Callable, Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table

from megatron_tst.planning.layouts import Layout, group_refusals
from megatron_tst.planning.memory import describe_parts
from megatron_tst.planning.plan import Plan
from megatron_tst.planning.published import Advice
from megatron_tst.planning.scale import Assumptions, ScaledRun
from megatron_tst.shape.hardware import Gpu
from megatron_tst.telemetry import short


def _numbers(first: str, *others: str, title: str | None = None) -> Table:
    """Return a table with names in the first column and right-justified numbers in the others."""
    table = Table(first, title=title)
    for column in others:
        table.add_column(column, justify="right")
    return table


def describe_run(plan: Plan, gpu: Gpu, num_gpus: int, price_per_gpu_hour: float | None) -> Iterator[RenderableType]:
    """Describe the positions, data tokens, FLOPs and costs of a run."""
    columns = "phase", "bag size", "steps", "positions", "data tokens", "FLOPs", "GPU-hours"
    table = _numbers(*columns, title="The run")
    for number, phase in enumerate(plan.phases, 1):
        counts = short(phase.positions), short(phase.data_tokens), f"{phase.flops:.3g}"
        hours = plan.gpu_hours * phase.num_steps / plan.num_steps
        table.add_row(str(number), str(phase.bag_size), str(phase.num_steps), *counts, f"{hours:,.0f}")
    counts = short(plan.positions), short(plan.data_tokens), f"{plan.flops:.3g}"
    table.add_row("all", "", str(plan.num_steps), *counts, f"{plan.gpu_hours:,.0f}", style="bold")
    yield table
    is_mixture = plan.active_parameters != plan.parameters
    active = f", {short(plan.active_parameters)} active" if is_mixture else ""
    yield f"{short(plan.parameters)} parameters{active}; {plan.flops_per_step:.4g} FLOPs per step in each phase."
    yield (
        f"MFU {plan.speed.mfu:.1%} of {gpu.peak_tflops:.0f} TFLOP/s ({plan.speed.source}): {plan.gpu_hours:,.0f} "
        f"GPU-hours, {plan.hours / 24:.2f} days on {num_gpus} {gpu.name}."
    )
    if price_per_gpu_hour is not None:
        yield f"Cost: {plan.gpu_hours * price_per_gpu_hour:,.0f} at {price_per_gpu_hour:g} per GPU-hour."


def describe_memory(layout: Layout, gpu: Gpu, usable: float) -> Iterator[RenderableType]:
    """Describe the memory of each stage of the configured layout, or say why it cannot be used."""
    if not layout.memory:
        yield f"\nThe configured layout cannot be used: {layout.refusal}"
        return
    yield f"\nMemory of the configured layout, {layout.name}:"
    table = _numbers("GiB per GPU", *(f"stage {stage}" for stage in range(len(layout.memory))))
    for name, sizes in describe_parts(layout.memory):
        cells = (f"{size:.2f}" for size in sizes)
        table.add_row(name.replace("_", " "), *cells, style="bold" if name == "total" else None)
    yield table
    verdict = "It fits" if layout.refusal is None else "It does not fit"
    yield (
        f"{verdict}: {usable:.0%} of {gpu.memory_gib:g} GiB can be used. Of 'logits and loss' and 'backward', only the "
        "larger one counts, because they do not exist at the same time.\n"
    )


def describe_recomputation(layouts: Sequence[Layout]) -> Iterator[RenderableType]:
    """Describe the memory of the fullest stage and the step time with each kind of activation recomputation."""
    if not layouts[0].memory:
        return
    columns = "--recompute-granularity", "activations, GiB", "total, GiB", "step, s", "fits"
    table = _numbers(*columns, title="Recomputation, in the configured layout")
    for layout in layouts:
        assert layout.step
        memory = layout.fullest
        sizes = f"{memory.activations / 2**30:.2f}", f"{memory.total / 2**30:.2f}"
        granularity = layout.config.training.recompute_granularity or "none"
        table.add_row(granularity, *sizes, f"{layout.step.total:.3g}", "no" if layout.refusal else "yes")
    yield table
    yield "selective: only attention, which keeps little anyway if it is fused. full: every layer (uniform, 1).\n"


def describe_layouts(
    chosen: Layout, fastest: Sequence[Layout], others: Sequence[Layout], efficiency: float, plan: Plan
) -> Iterator[RenderableType]:
    """Describe the layouts that fit, the fastest first, and why the others do not."""
    columns = "layout", "step, s", "bubble", "exposed", "GiB", "speed"
    table = _numbers(*columns, title="The fastest layouts that fit")
    configured = "  (configured)" if chosen.refusal is None else "  (configured, does not fit)"
    for layout in (*fastest, *([chosen] if chosen.step else [])):
        assert layout.step
        step = layout.step
        table.add_row(
            f"{layout.name}{configured}" if layout is chosen else layout.name,
            f"{step.total:.3g}",
            f"{step.bubble / step.total:.0%}",
            f"{step.exposed / step.total:.0%}",
            f"{layout.fullest.total / 2**30:.3g}",
            f"{fastest[0].step.total / step.total:.2f}" if fastest and fastest[0].step else "-",
            style="bold" if layout is chosen else None,
        )
    yield table
    reason = ""
    if chosen.step:
        hours = chosen.step.total * plan.num_steps / 3600
        reason = ", so that the configured layout takes the hours above"
        if hours > 1.01 * plan.hours:
            reason = f"; even so, the configured layout takes {hours / plan.hours:.2f} times the hours above"
    yield (
        "Exposed: communication that does not overlap with computation. Matrix multiplications of every size are "
        f"assumed to run at {efficiency:.1%} of the peak{reason}."
    )
    groups = group_refusals(others)
    if groups:
        yield "Why other layouts cannot be used:"
    for group in groups:
        yield f"  {len(group):5d}  {'such as ' if len(set(group)) > 1 else ''}{group[0]}"


def describe_advice(found_advice: Sequence[Advice], plan: Plan, data_tokens: float | None) -> Iterator[RenderableType]:
    """Describe the bag sizes and step ratios that the paper's runs suggest, with their data tokens."""
    table = Table("s", "r", "data tokens", "gain, nats", "source", title="\nBag size and step ratio, from the paper")
    for advice in found_advice:
        tokens = f"{short(advice.data_ratio * plan.positions)} ({advice.data_ratio:.2f} x)"
        table.add_row(str(advice.bag_size), f"{advice.step_ratio:g}", tokens, f"{advice.gain:.3f}", advice.source)
    if data_tokens is not None and plan.data_tokens > data_tokens:
        available = short(data_tokens)
        yield f"\nThe configured run reads {short(plan.data_tokens)} data tokens, but {available} are available."
    if not found_advice:
        yield "\nThe paper has no run with bags of text for so few data tokens: see --tst-superpose output."
        return
    yield table
    yield "Gain: relative to the same number of steps without bags, unless noted. The best s grows with scale."


def describe_scaled(runs: Sequence[ScaledRun], assumptions: Assumptions) -> Iterator[RenderableType]:
    """Describe a simulation of the run on other numbers of GPUs."""
    title = "\nThe same run on other numbers of GPUs (simulated)"
    table = Table("", *(f"{run.num_gpus} GPUs" for run in runs), title=title)
    for name, value in _scaled_rows(runs):
        table.add_row(name, *(value(run) if run.layout else "-" for run in runs))
    yield table
    for run in runs:
        if run.layout is None:
            yield f"On {run.num_gpus} GPUs no layout can be used; most often: {run.refusal}"
    yield (
        f"Assumed: the same global batch size; one failure per {assumptions.mtbf_gpu_hours:,.0f} GPU-hours (Llama 3's "
        f"rate) and {assumptions.restart_minutes:g} minutes to restart; blocking saves at "
        f"{assumptions.storage_gb_per_s_per_node:g} GB/s per node and {assumptions.storage_gb_per_s:g} GB/s in total; "
        "matrix multiplications equally fast at any size; no latency."
    )


def _scaled_rows(runs: Sequence[ScaledRun]) -> Iterator[tuple[str, Callable[[ScaledRun], str]]]:
    def share(part: str) -> Callable[[ScaledRun], str]:
        """Return a function that formats a part of the step as a percentage."""
        return lambda run: f"{getattr(run.layout.step, part) / run.layout.step.total:.0%}"  # type: ignore[union-attr]

    yield "layout", lambda run: run.layout.name if run.layout else ""
    yield "step, s", lambda run: f"{run.layout.step.total:.3g}"  # type: ignore[union-attr]
    yield "pipeline bubble", share("bubble")
    yield "exposed communication", share("exposed")
    steps = [run.layout.step for run in runs if run.layout and run.layout.step]
    for name in sorted({name for step in steps for name in step.volumes}):
        yield f"{name}, GB per step", _collective(name)
    yield "days without failures", lambda run: f"{run.days:.3g}"
    yield "expected failures", lambda run: f"{run.failures:.2g}"
    yield "time to write a checkpoint, s", lambda run: f"{run.checkpoint_s:.2g}"
    yield "best --save-interval", lambda run: str(run.save_interval_steps)
    yield "time that makes progress", lambda run: f"{run.goodput:.1%}"
    yield "days", lambda run: f"{run.days / run.goodput:.3g}"


def _collective(name: str) -> Callable[[ScaledRun], str]:
    def value(run: ScaledRun) -> str:
        """Format the bytes that a GPU sends and the time that they take."""
        assert run.layout and run.layout.step
        step = run.layout.step
        return f"{step.volumes[name] / 1e9:.3g} in {1e3 * step.times[name]:.3g} ms" if name in step.volumes else "-"

    return value
