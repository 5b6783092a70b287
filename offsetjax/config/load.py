"""Configs in files of `get_config()`, in `--config.path=value` on the command line, and as JSON in a work directory.

A config file is Python that starts from `default_config()` and changes what it needs. The dictionary is locked and
typed, so that a mistyped key or a wrong type fails where it is written.
"""

import hashlib
import json
import re
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from offsetjax.config.checks import validate
from offsetjax.config.names import suggestion
from offsetjax.config.schema import default_config, fields
from offsetjax.config.settings import assign, explicit_paths, flatten
from offsetjax.config.values import from_text, must_be, shown
from offsetjax.errors import UserError
from offsetjax.json_text import parse_object

_EXPLICIT = "explicit"  # beside the fields in config.json: those that were set
_EXAMPLES = {"get_config": "configs/stamps.py", "get_grid": "configs/sweeps/sd15_strength.py"}


@dataclass(frozen=True)
class Origin:
    """Where a config came from: its file, and what the command line changed."""

    path: str
    overrides: Sequence[tuple[str, str]] = ()

    def text(self) -> str:
        """The file's, as it is now."""
        return epath.Path(self.path).read_bytes().decode(errors="replace")


def load_config(path: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Runs a config file and applies `--config.path=value` overrides.

    Args:
        path: a local Python file that defines `get_config() -> ConfigDict`.
        overrides: pairs of a field's path and its value as text.

    Raises:
        UserError: a missing or broken file, an unknown key, a wrong type, a value out of range.
    """
    config = run_file(path, "get_config")
    if not isinstance(config, ConfigDict) or dict(flatten(config)).keys() != fields().keys():
        raise UserError(f"config: {path}: get_config() must return the ConfigDict of default_config()")
    for key, text in overrides:
        override(config, key, text)
    validate(config)
    return config


def run_file(path: str, function: str) -> Any:
    """Runs a config file, and what its `function()` returns.

    Raises:
        UserError: a missing or broken file, or one without that function.
    """
    if "://" in path or not (file := epath.Path(path)).is_file():
        raise UserError(f"config: {path} is not a local file; give a path such as configs/stamps.py")
    if file.suffix.lower() in (".toml", ".yaml", ".yml", ".json"):
        raise UserError(
            f"config: {path} is {file.suffix[1:].upper()}; a config is a Python file with {function}(), see "
            f"{_EXAMPLES[function]}; `offsetjax config NAME` says what a setting of another trainer is called here"
        )
    try:
        names = runpy.run_path(path)
        if function not in names:
            raise UserError(f"config: {path}: no function {function}(); see {_EXAMPLES[function]} for the form")
        return names[function]()
    except UserError:
        raise
    except Exception as error:  # a config file is the user's own Python: anything may be raised
        raise UserError(f"config: {path}: {_describe(error)}") from error
    except SystemExit as error:
        raise UserError(f"config: {path} ends the program (SystemExit: {error}); let get_config() return") from error


def _describe(error: Exception) -> str:
    if key := _unknown_key(error):
        return f"unknown key {key!r}; {suggestion(key)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _unknown_key(error: Exception) -> str | None:
    """The key that the dictionary does not have; None where the error is another's."""
    if locked := re.search(r'Key "(.+?)" does not exist', str(error)):
        return locked[1]
    return error.name if isinstance(error, AttributeError) and isinstance(error.obj, ConfigDict) else None


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one field from text, keeping its type.

    Raises:
        UserError: an unknown key, with the nearest valid one, or text that is not of the field's type.
    """
    field = fields().get(key)
    if field is None:
        raise UserError(f"config: unknown key {shown(key)}; {suggestion(key)}")
    assign(config, key, from_text(key, field, text))


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, the form kept in a work directory, with the names of the fields that were set."""
    return json.dumps({**config.to_dict(), _EXPLICIT: explicit_paths(config)}, indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote; fields that are newer than the text have their defaults.

    Raises:
        UserError: a field that this version does not know, or a value that is not of its type.
        ValueError: it is no JSON, or no object.
    """
    config, declared = default_config(), fields()
    values, explicit = read_json(text)
    for path, value in values.items():
        if path not in declared:
            raise UserError(f"config: unknown key {shown(path)} in a stored config.json; {suggestion(path)}")
        value = tuple(value) if isinstance(value, list) else value
        is_of_type = declared[path].has_type(value) and (type(value) is not int or abs(value) < 2**63)
        if not is_of_type:
            raise UserError(f"config: a stored {path} = {shown(value)} {must_be(declared[path])}")
        assign(config, path, value, explicit=path in explicit)
    return config


def read_json(text: str) -> tuple[dict[str, Any], frozenset[str]]:
    """The values of a stored config by their paths, whichever version wrote them, and which of them were set.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    stored = parse_object(text)
    explicit = stored.pop(_EXPLICIT, [])
    stored.pop("digest", None)  # of the file, which whoever reads a work directory has compared
    if not isinstance(explicit, list) or not all(isinstance(path, str) for path in explicit):
        raise ValueError(f"its {_EXPLICIT!r} is no list of fields")
    return _completed(_by_path(stored, "")), frozenset(explicit)


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """With what followed from other fields before it was a field: text encoders with a learning rate were trained."""
    learnt = bool(values.get("optimizer.text_encoder_learning_rate"))
    return {"train.text_encoders": learnt, **values} if learnt else values


def _by_path(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if "." in key:
            raise ValueError(f"it has the key {shown(key)}, which is no name")
        values |= _by_path(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


def digest(path: str) -> str:
    """The SHA-256 of a config file, in hexadecimal."""
    return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()
