"""The settings of a run: read from a YAML file and flags, and checked by every rule that relates them."""

from megatron_tst.config.errors import EXIT_CODE, EXIT_RESUMABLE, DivergedError, StoppedInSetUp, UserError, require
from megatron_tst.config.parse import (
    config_from_mapping,
    dump_config,
    find_named,
    find_trainer,
    load_config,
    load_config_text,
    parse_config,
    read_config,
    read_files,
)
from megatron_tst.config.presets import PRESETS
from megatron_tst.config.rules import check_config, check_layout, check_sizes, global_batch_size
from megatron_tst.config.settings import (
    CheckpointSettings,
    DataSettings,
    LoggingSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RunConfig,
    SuperpositionSettings,
    TrainingSettings,
)
from megatron_tst.config.strict_json import write_json

__all__ = [
    "EXIT_CODE",
    "EXIT_RESUMABLE",
    "PRESETS",
    "CheckpointSettings",
    "DataSettings",
    "DivergedError",
    "LoggingSettings",
    "ModelSettings",
    "OptimizerSettings",
    "ParallelSettings",
    "RunConfig",
    "StoppedInSetUp",
    "SuperpositionSettings",
    "TrainingSettings",
    "UserError",
    "check_config",
    "check_layout",
    "check_sizes",
    "config_from_mapping",
    "dump_config",
    "find_named",
    "find_trainer",
    "global_batch_size",
    "load_config",
    "load_config_text",
    "parse_config",
    "read_config",
    "read_files",
    "require",
    "write_json",
]
