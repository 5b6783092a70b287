"""The settings of a training: the fields and their ranges, what goes together, files and overrides, architectures."""

from offsetjax.config.checks import validate
from offsetjax.config.load import Origin, digest, from_json, load_config, override, run_file, to_json
from offsetjax.config.schema import default_config, is_indifferent, may_change_on_resume
from offsetjax.config.settings import assign, flatten, is_explicit
from offsetjax.config.stages import Stage, config_at, config_of_stage, stages_of

__all__ = [
    "Origin",
    "Stage",
    "assign",
    "config_at",
    "config_of_stage",
    "default_config",
    "digest",
    "flatten",
    "from_json",
    "is_explicit",
    "is_indifferent",
    "load_config",
    "may_change_on_resume",
    "override",
    "run_file",
    "stages_of",
    "to_json",
    "validate",
]
