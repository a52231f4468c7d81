"""Describes a comparison of runs by a table and sentences."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from megatron_tst.analysis.compare import (
    TOLERANCE,
    Estimate,
    Group,
    Method,
    SpeedUp,
    SpeedUpBound,
    counterpart,
    difference,
    speed_ups,
)
from megatron_tst.telemetry.progress import short

COLUMNS = ("run", "seeds", "bag sizes", "steps", "FLOPs", "data tokens", "GPU-hours", "final loss")
# Settings that determine the tokens of the validation loss.
_TEXT = {"--data-path", "--train-data-path", "--valid-data-path", "--split", "--tokenizer-model", "--vocab-size"}
CAPTION = "Final loss: next-token validation loss in nats per token, with its standard error over seeds."


def table_rows(methods: Sequence[Method]) -> Iterator[tuple[str, ...]]:
    """Yield a row of :data:`COLUMNS` per group."""
    for method in methods:
        for group in method.groups:
            yield (
                group.name,
                str(len(group.runs)),
                " then ".join(map(str, group.runs[0].bag_sizes)),
                str(group.num_steps),
                f"{group.total('flops'):.3g}",
                short(group.total("data_tokens")),
                f"{group.total('gpu_hours'):.3g}",
                group.final_loss.write(4),
            )


def sentences(methods: Sequence[Method]) -> Iterator[str]:
    """Yield sentences that compare each method with the first one, the baseline."""
    baseline, *others = methods
    for method in others:
        yield from _other_settings(method, baseline)
        for group in method.groups:
            yield from _at_equal_cost(group, baseline)
        yield from _at_equal_loss(method, baseline)
        for group in method.groups:
            yield from _switch(group)


def _other_settings(method: Method, baseline: Method) -> Iterator[str]:
    """Yield the settings, except superposition, in which a method differs from the baseline."""
    ours, theirs = (other.groups[0].runs[0].setting for other in (method, baseline))
    # Runs of Megatron-LM's trainer have the flags that they were given.
    differing = [flag for flag in {**ours, **theirs} if ours.get(flag) != theirs.get(flag)]
    if differing:
        told = ", ".join(
            f"{flag} {_value(ours.get(flag))} (instead of {_value(theirs.get(flag))})" for flag in differing
        )
        yield f"Settings: {method.name} differs from {baseline.name} in {told}."
    if not _TEXT.isdisjoint(differing):
        yield "Losses per token are comparable only if text and tokenizer are the same: the following may not hold."


def _value(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _at_equal_cost(group: Group, baseline: Method) -> Iterator[str]:
    equal = counterpart(group, baseline, "flops")
    if equal:
        data = group.total("data_tokens") / equal.total("data_tokens")
        yield f"Equal FLOPs: {_ends(group, equal)}, having read {data:.3g} x its data tokens."
    equal = counterpart(group, baseline, "data_tokens")
    if equal:
        flops = group.total("flops") / equal.total("flops")
        yield f"Equal data: {_ends(group, equal)}, with {flops:.3g} x its FLOPs."
        return
    known = baseline.groups[-1]
    steps = round(group.total("data_tokens") / known.total("data_tokens") * known.num_steps)
    yield f"Equal data: not compared; {group.name} read as many data tokens as {known.name} would in {steps} steps."


def _ends(group: Group, baseline: Group) -> str:
    found = difference(group, baseline)
    side = "below" if found.value < 0 else "above"
    gap = Estimate(abs(found.value), found.error).write(4)
    return f"{group.name} ends {gap} nats {side} {baseline.name}"


def _at_equal_loss(method: Method, baseline: Method) -> Iterator[str]:
    what = f"Equal loss: the speed-up of {method.name} over {baseline.name} is"
    match speed_ups(method, baseline):
        case [SpeedUpBound() as lower, SpeedUpBound() as upper] if lower.ratio > upper.ratio:
            yield (
                f"{what} not known: {_ends(lower.group, lower.baseline)}, so at least {lower.ratio:.2f} x, but "
                f"{_ends(upper.group, upper.baseline)}, so less than {upper.ratio:.2f} x. More seeds are needed."
            )
        case found:
            yield from (f"{what} {_tell(speed_up, method, baseline)}" for speed_up in found)


def _tell(speed_up: SpeedUp | SpeedUpBound, method: Method, baseline: Method) -> str:
    if isinstance(speed_up, SpeedUp):
        anchor, seeds = speed_up.anchor, len(speed_up.anchor.runs)
        told = "one seed, uncertainty unknown" if seeds == 1 else f"{seeds} seeds"
        if seeds > 1 and speed_up.ratio.error is None:
            told = f"the mean of {told}, uncertainty unknown"
        return f"{speed_up.ratio.write(2)} x at the {anchor.final_loss.value:.4f} nats of {anchor.name} ({told})."
    shorter, longer = (method, baseline) if speed_up.is_lower else (baseline, method)
    if abs(speed_up.ratio - 1) < TOLERANCE:
        return (
            f"not known from runs of one length: {_ends(speed_up.group, speed_up.baseline)}. Shorter runs of "
            f"{shorter.name} or longer runs of {longer.name} are needed."
        )
    side = "at least" if speed_up.is_lower else "less than"
    return (
        f"{side} {speed_up.ratio:.2f} x: {_ends(speed_up.group, speed_up.baseline)}. For the exact value, shorter runs "
        f"of {shorter.name} or longer runs of {longer.name} are needed."
    )


def _switch(group: Group) -> Iterator[str]:
    """Describe how a group's runs recovered from their last switch."""
    found = [run.recovery for run in group.runs if run.recovery]
    steps = [recovery["recovery_steps"] for recovery in found if recovery["recovery_steps"] is not None]
    if not found:
        return
    rise = fmean(recovery["spike"] for recovery in found)
    back = f"recovered after {fmean(steps):.3g} steps" if steps else "did not recover by the end of the phase"
    if 0 < len(steps) < len(found):
        back += f" in {len(steps)} of {len(found)} runs"
    rose = f"rose by {rise:.2f} nats and {back}" if rise > 0 else "did not rise"
    yield f"Switch: the training loss of {group.name} {rose}."


def report(methods: Sequence[Method], picture: str) -> str:
    """Return the comparison as Markdown.

    Args:
        methods: methods, the baseline first.
        picture: path of the plot, relative to the report.
    """
    rows = [COLUMNS, ("---",) * len(COLUMNS), *table_rows(methods)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    lines = "\n".join(f"- {line}" for line in sentences(methods))
    baseline, *others = (method.name for method in methods)
    title = " against ".join([" and ".join(others), baseline] if others else [baseline])
    return f"# {title}\n\n{table}\n\n{CAPTION}\n\n{lines}\n\n![loss curves]({picture})\n"
