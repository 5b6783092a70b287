"""Hides what only tests have from processes of the command, whose users have none of it. Python runs this by itself."""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

HIDDEN = ("accelerate", "peft", "torch", "transformers")


class _Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if fullname.split(".")[0] in HIDDEN else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = _Finder
