"""Names that are not ours: what was meant, from what other trainers call it or from the nearest of ours."""

import difflib
import re

from offsetjax.config.schema import fields, sections


def foreign_names() -> dict[str, str]:
    """The path of the field that other trainers call by a name."""
    return {name: path for path, field in fields().items() for name in field.elsewhere}


def suggestion(key: str) -> str:
    """What to write in place of a key that there is not, as the end of a sentence."""
    key = key[:200]  # no field's name is longer, and the nearest of a long one takes long to find
    leaf = key.rsplit(".", 1)[-1]
    if meant := foreign_names().get(leaf):
        return f"it is called {meant} here"
    near = nearest(key)
    return f"did you mean {near[0]}?" if near else "`offsetjax config` lists the fields"


def nearest(key: str) -> list[str]:
    """Fields and sections whose path, or its end, is close to a key; the closest first."""
    leaf, paths = key.rsplit(".", 1)[-1], list(fields())
    inner = {name: name for section in sections() for name in section.path.split(".") if name}
    by_leaf = inner | {path.rsplit(".", 1)[-1]: path for path in sorted(paths)}
    by_name = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)]
    by_path = difflib.get_close_matches(key, paths, 1, 0.5)
    section = key.rpartition(".")[0]
    words = {word: path for path in paths if path.rpartition(".")[0] == section for word in re.split(r"[._]", path)}
    by_word = [words[word] for word in difflib.get_close_matches(leaf, words, 1, 0.75)] if section else []
    return by_word + by_path + by_name if section else by_name + by_path
