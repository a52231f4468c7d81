"""What becomes of a run whose setting differs: stated once per setting, read by resumption, comparison and sweeps."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_KEY = "effect"


@dataclass(frozen=True)
class Effect:
    """What a different value of a setting means.

    Attributes:
        is_reported: whether a run that continues from a checkpoint says that the value has changed.
        is_binding: whether it refuses to continue.
        is_compared: whether finished runs with different values are different settings, rather than seeds, lengths or
            layouts of one.
        alters_function: whether the same weights compute something else.
    """

    is_reported: bool
    is_binding: bool
    is_compared: bool
    alters_function: bool = False


# Where a run takes place, what it writes, when it stops.
NOTHING = Effect(is_reported=False, is_binding=False, is_compared=False)
# How the same numbers are computed.
COMPUTATION = Effect(is_reported=True, is_binding=False, is_compared=False)
# What is counted in steps, which a longer run has more of.
LENGTH = COMPUTATION
# Rates and regularisation, which a run may change on its way.
TUNING = Effect(is_reported=True, is_binding=False, is_compared=True)
# How positions reach experts: a run may change it on its way, though the same weights then compute something else.
ROUTING = Effect(is_reported=True, is_binding=False, is_compared=True, alters_function=True)
# Another run of the same method.
RUN = Effect(is_reported=True, is_binding=True, is_compared=False)
# Another way of training.
METHOD = Effect(is_reported=True, is_binding=True, is_compared=True)
# Another model.
MODEL = Effect(is_reported=True, is_binding=True, is_compared=True, alters_function=True)
# Names of files: a checkpoint knows what they held, and a mount may have another name elsewhere.
TEXT = Effect(is_reported=False, is_binding=False, is_compared=True)


def having(effect: Effect) -> dict[str, Effect]:
    """Return the metadata of a field, or of a whole section whose fields have none of their own."""
    return {_KEY: effect}


def effect_of(config: Any, name: str) -> Effect:
    """Return the effect of a setting.

    Args:
        config: the settings of a run, or their class.
        name: of the setting, with its section: ``model.num_layers``.
    """
    section, _, setting = name.partition(".")
    whole = next(field for field in dataclasses.fields(config) if field.name == section)
    parts = dataclasses.fields(whole.type) if setting and dataclasses.is_dataclass(whole.type) else ()
    own: Mapping[str, Effect] = next((field.metadata for field in parts if field.name == setting), {})
    effect: Effect = own.get(_KEY) or whole.metadata[_KEY]
    return effect
