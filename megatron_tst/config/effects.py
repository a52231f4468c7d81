"""What changing a setting means for a run: stated once per setting, read by resumption, comparison and sweeps."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_KEY = "effect"


@dataclass(frozen=True)
class Effect:
    """What a different value of a setting means.

    Attributes:
        is_reported: whether a run that resumes from a checkpoint reports that the value has changed.
        is_binding: whether a run refuses to resume with another value.
        is_compared: whether finished runs with different values are compared as different configurations, rather than
            grouped as seeds, lengths or layouts of one configuration.
        alters_function: whether the same weights compute a different function under another value.
        alters_optimizer_state: whether the optimizer's state has another shape under another value.
    """

    is_reported: bool
    is_binding: bool
    is_compared: bool
    alters_function: bool = False
    alters_optimizer_state: bool = False


# Where a run executes, what it writes and when it stops.
NOTHING = Effect(is_reported=False, is_binding=False, is_compared=False)
# How the same numbers are computed.
COMPUTATION = Effect(is_reported=True, is_binding=False, is_compared=False)
# Numbers of steps, which are larger in a longer run.
LENGTH = COMPUTATION
# Rates and regularisation, which may change in the middle of a run.
TUNING = Effect(is_reported=True, is_binding=False, is_compared=True)
# How positions reach experts: it may change in the middle of a run, but the same weights then compute something else.
ROUTING = Effect(is_reported=True, is_binding=False, is_compared=True, alters_function=True)
# Another run of the same method.
RUN = Effect(is_reported=True, is_binding=True, is_compared=False)
# How the optimizer's state is stored, and the precision that it follows from: a run may change them without
# loading that state.
STATE = Effect(is_reported=True, is_binding=False, is_compared=False, alters_optimizer_state=True)
PRECISION = Effect(is_reported=True, is_binding=False, is_compared=True, alters_optimizer_state=True)
# Another training method.
METHOD = Effect(is_reported=True, is_binding=True, is_compared=True)
# Another model.
MODEL = Effect(is_reported=True, is_binding=True, is_compared=True, alters_function=True)
# File names: a checkpoint records what the files held, and the same files may be mounted under another name elsewhere.
TEXT = Effect(is_reported=False, is_binding=False, is_compared=True)


def having(effect: Effect) -> dict[str, Effect]:
    """Return the metadata that gives a field this effect, or every field of a section that has no effect of its own."""
    return {_KEY: effect}


def effect_of(config: Any, name: str) -> Effect:
    """Return the effect of a setting.

    Args:
        config: the run's settings, or their class.
        name: the setting's name with its section, such as ``model.num_layers``.
    """
    section, _, setting = name.partition(".")
    whole = next(field for field in dataclasses.fields(config) if field.name == section)
    parts = dataclasses.fields(whole.type) if setting and dataclasses.is_dataclass(whole.type) else ()
    own: Mapping[str, Effect] = next((field.metadata for field in parts if field.name == setting), {})
    effect: Effect = own.get(_KEY) or whole.metadata[_KEY]
    return effect
