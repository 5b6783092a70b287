"""What a training is told: the fields and their ranges, what goes together, files and overrides, architectures."""

from offsetjax.config.checks import validate
from offsetjax.config.load import default_config, digest, flatten, from_json, load_config, override, run_file, to_json

__all__ = [
    "default_config",
    "digest",
    "flatten",
    "from_json",
    "load_config",
    "override",
    "run_file",
    "to_json",
    "validate",
]
