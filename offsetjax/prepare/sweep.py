"""Sweeps: the trainings that a config file with a grid stands for.

    def get_config() -> ConfigDict: ...          what all of them share, as in any config file
    def get_grid():                              which fields take which values
        return {"noise.offset_strength": (0.0, 0.1), "seed": (0, 1, 2)}

The points of a grid are all combinations, the last field varying fastest; a list of grids has the points of each in
turn. A point is an ordinary training of the same file with some fields overridden, in a folder named after them.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from offsetjax.config import flatten, load_config, override, run_file
from offsetjax.errors import UserError
from offsetjax.storage.checkpoint import newest_step
from offsetjax.training.setup import reopened

Overrides = Sequence[tuple[str, str]]
Grid = Mapping[str, Iterable[Any]]

_LONGEST = 100  # letters of a run's name: file systems end at 255, and others add to it


@dataclass(frozen=True)
class Point:
    """One training: `overrides` are those of the grid, as text, and `config` has them and all others."""

    name: str
    overrides: tuple[tuple[str, str], ...]
    config: ConfigDict


def load_points(path: str, overrides: Overrides = ()) -> list[Point]:
    """The points of a sweep file, all of them valid.

    Args:
        path: a local Python file with `get_config()` and `get_grid()`.
        overrides: pairs of a field's path and its value as text, for every point.

    Raises:
        UserError: a bad file, grid or override; a point that the config refuses; two points that are the same.
    """
    base = run_file(path, "get_config")
    if not isinstance(base, ConfigDict):
        raise UserError(f"config: {path}: get_config() must return the ConfigDict of default_config()")
    fields = dict(flatten(base))
    for key, text in overrides:
        override(base, key, text)
    found = run_file(path, "get_grid")
    grids = [_read_grid(path, grid, base) for grid in (found if isinstance(found, list | tuple) else [found])]
    if not grids:
        raise UserError(f"sweep: {path}: get_grid() has no grid; return at least {{'seed': (0, 1, 2)}}")
    swept = dict.fromkeys(field for grid in grids for field in grid)
    for key, _ in overrides:
        if key in swept:
            raise UserError(f"sweep: --config.{key} is given, but {path} sweeps over it; give it in one place")
    labels = _labels(swept)
    combinations = [
        dict(zip(grid, values, strict=True)) for grid in grids for values in itertools.product(*grid.values())
    ]
    points = [_point(path, overrides, labels, values, fields) for values in combinations]
    _check_apart(points)
    return points


def _read_grid(path: str, grid: Any, base: ConfigDict) -> dict[str, list[Any]]:
    """The grid with its values as lists, each of its field's type."""
    if not isinstance(grid, Mapping) or not grid:
        raise UserError(
            f"sweep: {path}: get_grid() must return fields and their values, such as {{'seed': (0, 1, 2)}}, "
            f"or a list of such; got {grid!r}"
        )
    fields = dict(flatten(base))
    read = {}
    for field, values in grid.items():
        if field not in fields:
            override(base, str(field), "")  # says which is the nearest
        if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
            raise UserError(f"sweep: {path}: {field} = {values!r} is not a list of values, such as ({values!r},)")
        read[field] = list(values)
        if not read[field]:
            raise UserError(f"sweep: {path}: {field} has no values; give at least one, or take it out of the grid")
        for value in read[field]:
            if not _fits(value, fields[field]):
                raise UserError(
                    f"sweep: {path}: {field} has the value {value!r}, which is not of type "
                    f"{type(fields[field]).__name__}, such as {fields[field]!r}"
                )
    return read


def _fits(value: Any, like: Any) -> bool:
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(like, bool) and isinstance(value, bool)
    kinds = {int: Integral, float: Real, tuple: list | tuple, str: str}
    return isinstance(value, kinds[type(like)])


def _text(value: Any, like: Any) -> str:
    """A value as `--config.path=` takes it; the same for all ways to write it, 0 and 0.0 for instance."""
    return str(value) if isinstance(like, str) else repr(type(like)(value))


def _labels(fields: Iterable[str]) -> dict[str, str]:
    """The shortest end of each path that no other has: `noise.offset_strength → offset_strength`."""
    parts = {field: field.split(".") for field in fields}
    labels = {}
    for field, own in parts.items():
        ends = (".".join(own[-depth:]) for depth in range(1, len(own) + 1))
        others = [f".{other}" for other in parts if other != field]
        labels[field] = next(end for end in ends if not any(other.endswith(f".{end}") for other in others))
    return labels


def _point(
    path: str, overrides: Overrides, labels: Mapping[str, str], values: Mapping[str, Any], fields: Mapping[str, Any]
) -> Point:
    texts = {field: _text(value, fields[field]) for field, value in values.items()}
    name = _name({labels[field]: text for field, text in texts.items()})
    try:
        config = load_config(path, [*overrides, *texts.items()])
    except UserError as error:
        raise UserError(f"sweep: {name}: {error}") from error
    return Point(name, tuple(texts.items()), config)


def _name(texts: Mapping[str, str]) -> str:
    """`offset_strength=0.1,seed=1`: of letters that no file system, bucket or shell minds.

    Where others had to be replaced, or it would be too long, a digest of the whole keeps it apart from its like.
    """
    exact = ",".join(f"{label}={text}" for label, text in texts.items())
    plain = {label: "-".join(re.findall(r"[A-Za-z0-9._+-]+", text)) for label, text in texts.items()}
    name = ",".join(f"{label}={text}" for label, text in plain.items())
    if name == exact and len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{name[: _LONGEST - 9]}-{digest}"


def _check_apart(points: Sequence[Point]) -> None:
    configs: dict[str, str] = {}
    for point in points:
        key = repr(sorted(flatten(point.config)))
        if key in configs:
            raise UserError(f"sweep: the points {configs[key]} and {point.name} are the same training; leave one out")
        configs[key] = point.name
    # Not every file system distinguishes a from A.
    name, count = Counter(point.name.lower() for point in points).most_common(1)[0]
    if count > 1:
        raise UserError(f"sweep: {count} points would be called {name}; give them values that differ in more than case")


def training_arguments(path: str, workdir: str, overrides: Overrides, point: Point) -> list[str]:
    """The arguments of the command `offsetjax` that trains a point."""
    changes = [f"--config.{key}={text}" for key, text in (*overrides, *point.overrides)]
    return ["train", f"--config={path}", f"--workdir={workdir.rstrip('/')}/{point.name}", *changes]


def state(point: Point, workdir: str) -> str:
    """`new`, `step 200 of 350`, or `done`, by the newest checkpoint in the point's folder of `workdir`.

    Raises:
        UserError: the folder has a training that the point cannot resume, or cannot be read.
    """
    folder = epath.Path(workdir) / point.name
    if not (folder / "config.json").exists():
        return "new"
    reopened(point.config, folder)  # a point that was changed is not done
    step = newest_step(folder)
    steps = point.config.train.steps
    return "done" if step >= steps else f"step {step} of {steps}"


def listing(path: str, workdir: str, overrides: Overrides = ()) -> Iterator[str]:
    """A line a point: its state, its name and the arguments that train it, with tabs between them.

    Raises:
        UserError: as for `load_points` and `state`, before the first line.
    """
    points = load_points(path, overrides)
    lines = [
        [state(point, workdir), point.name, *training_arguments(path, workdir, overrides, point)] for point in points
    ]
    for line in lines:
        for field in line:
            if not field.isprintable():
                raise UserError(f"sweep: {field!r} has a control character; leave it out")
    return ("\t".join(line) for line in lines)
