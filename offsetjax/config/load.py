"""Configurations: typed defaults, files of `get_config()`, and `--config.path=value` on the command line.

A config file is Python that starts from `default_config()` and changes what it needs. The dictionary is locked and
typed, so that a mistyped key or a wrong type fails where it is written. The path of a field is the name of the
module that reads it: `noise.offset_strength` is read by `offsetjax.diffusion.noise`.
"""

import ast
import difflib
import hashlib
import json
import re
import runpy
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from offsetjax.config.checks import validate
from offsetjax.config.schema import FOREIGN_NAMES, default_config, flatten
from offsetjax.errors import UserError

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


def load_config(path: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Runs a config file and applies `--config.path=value` overrides.

    Args:
        path: a local Python file that defines `get_config() -> ConfigDict`.
        overrides: pairs of a field's path and its value as text.

    Raises:
        UserError: a missing or broken file, an unknown key, a wrong type, a value out of range.
    """
    config = run_file(path, "get_config")
    if not isinstance(config, ConfigDict) or dict(flatten(config)).keys() != dict(flatten(default_config())).keys():
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
    if "://" in path or not epath.Path(path).is_file():
        raise UserError(f"config: {path} is not a local file; give a path such as configs/stamps.py")
    try:
        names = runpy.run_path(path)
        if function not in names:
            raise UserError(f"config: {path}: no function {function}(); see {_EXAMPLES[function]} for the form")
        return names[function]()
    except UserError:
        raise
    except Exception as error:  # a config file is the user's own Python: anything may be raised
        raise UserError(f"config: {path}: {_describe(error)}") from error


_EXAMPLES = {"get_config": "configs/stamps.py", "get_grid": "configs/sweeps/sd15_strength.py"}


def _describe(error: Exception) -> str:
    if key := _unknown_key(error):
        return f"unknown key {key!r}; {_nearest(key)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _unknown_key(error: Exception) -> str | None:
    """The key that the dictionary does not have; None where the error is another's."""
    if locked := re.search(r'Key "(.+?)" does not exist', str(error)):
        return locked[1]
    return error.name if isinstance(error, AttributeError) and isinstance(error.obj, ConfigDict) else None


def _nearest(key: str) -> str:
    leaf = key.rsplit(".", 1)[-1]
    if leaf in FOREIGN_NAMES:
        return f"it is called {FOREIGN_NAMES[leaf]} here"
    paths = [path for path, _ in flatten(default_config())]
    sections = {section: section for path in paths for section in path.split(".")[:-1]}
    by_leaf = sections | {path.rsplit(".", 1)[-1]: path for path in paths}
    by_name = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)]
    by_path = difflib.get_close_matches(key, paths, 1, 0.5)
    near = by_path + by_name if "." in key else by_name + by_path
    return f"did you mean {near[0]}?" if near else "see offsetjax/config/schema.py for the list"


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one field from text, keeping its type.

    Raises:
        UserError: an unknown key, with the nearest valid one, or text that is not of the field's type.
    """
    values = dict(flatten(config))
    if key not in values:
        raise UserError(f"config: unknown key {key!r}; {_nearest(key)}")
    old = values[key]
    try:
        new = _parse(text, old)
    except (ValueError, TypeError, SyntaxError):
        raise UserError(f"config: {key} = {text!r} is not of type {type(old).__name__}, such as {old!r}") from None
    section, _, leaf = key.rpartition(".")
    node = config
    for name in section.split(".") if section else ():
        node = node[name]
    with node.ignore_type():
        node[leaf] = new


def _parse(text: str, like: Any) -> Any:
    if isinstance(like, bool):
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _fail(text)
    if isinstance(like, int):
        return int(text)
    if isinstance(like, float):
        return float(text)
    if isinstance(like, tuple):
        value = ast.literal_eval(text)
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    return text


def _fail(text: str) -> Any:
    raise ValueError(text)


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, the form kept in a work directory."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote.

    Raises:
        UserError: a field that this version does not know.
        ValueError: it is no JSON, or no object.
    """
    config, stored = default_config(), json.loads(text)
    if not isinstance(stored, dict):
        raise ValueError(f"it is a {type(stored).__name__}, not an object")
    known = dict(flatten(config))
    for path, value in flatten(ConfigDict(stored, convert_dict=True)):
        if path not in known:
            raise UserError(f"config: unknown key {path!r} in a stored config.json; {_nearest(path)}")
        section, _, leaf = path.rpartition(".")
        node = config
        for name in section.split(".") if section else ():
            node = node[name]
        with node.ignore_type():
            node[leaf] = tuple(value) if isinstance(value, list) else value
    return config


def digest(path: str) -> str:
    """The SHA-256 of a config file, in hexadecimal."""
    return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()
