"""Work directories as the training leaves them: config.json, metrics.jsonl, samples/NAME.json and NAME.png."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath
from PIL import Image, UnidentifiedImageError

from offsetjax.config import Stage
from offsetjax.config.load import read_json
from offsetjax.config.stages import stages_in
from offsetjax.data.brightness import data_brightness, evenly_spaced
from offsetjax.data.source import Features, open_source
from offsetjax.errors import UserError, one_line
from offsetjax.json_text import is_damaged, parse_object
from offsetjax.training.goodput import read_goodput
from offsetjax.training.jsonl import read_log


@dataclass(frozen=True)
class Record:
    """One generated picture; `brightness` is the mean of its RGB values, 0 black and 1 white.

    `box` is its place in the grid, in pixels from the top left corner: left, top, right, bottom; older records
    do not have it.
    """

    prompt: str
    seed: int
    brightness: float
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Samples:
    """One grid of pictures: how it was drawn, each picture's brightness and, if there is one, the PNG."""

    name: str
    step: int
    params: str
    start_noise: str
    guidance_scale: float
    num_steps: int
    records: tuple[Record, ...]
    picture: epath.Path | None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts in the order of the grid's rows."""
        return tuple(dict.fromkeys(record.prompt for record in self.records))

    @property
    def has_places(self) -> bool:
        """Whether there is a grid of which each picture's place is known."""
        return self.picture is not None and all(record.box for record in self.records)

    @property
    def setting(self) -> tuple[Any, ...]:
        """What must agree for two grids to be comparable."""
        return self.params, self.start_noise, self.guidance_scale, self.num_steps

    def brightness(self, prompt: str) -> list[float]:
        """The brightness of a prompt's pictures, one a seed."""
        return [record.brightness for record in self.records if record.prompt == prompt]


@dataclass(frozen=True)
class Data:
    """The brightness of a data set: one caption and one value for each of the pictures measured, of `size`."""

    size: int
    captions: tuple[str, ...]
    brightness: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One training: its config by field path, its metrics by logged step, its samples by step, and the others.

    `evaluations` are the lines of metrics.jsonl that hold validation losses or the brightness of a probe.
    """

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    steps: list[Samples]
    others: list[Samples]
    data: Data | str  # or why it could not be measured
    seconds: Mapping[str, float] = field(default_factory=dict)  # of the wall clock, by what they were spent on
    stages: Sequence[Stage] = ()  # where there are several


def read_runs(workdirs: Sequence[str]) -> list[Run]:
    """Reads work directories; a run is named by its folder, and by its parent too where that is not unique.

    Args:
        workdirs: each of a training, or of a sweep: a folder of trainings, of which those that have begun are read.

    Raises:
        UserError: no work directory, or a file that is missing or malformed.
    """
    if not workdirs:
        raise UserError("report: no work directory; give at least one --workdir=DIR")
    workdirs = [run for workdir in workdirs for run in _runs_of(workdir)]
    data: dict[tuple[str, str, bool, str, int, Features], Data | str] = {}
    return [_read_run(epath.Path(path), name, data) for path, name in zip(workdirs, _names(workdirs), strict=True)]


def _runs_of(workdir: str) -> list[str]:
    """The work directory itself, or those in it by name, numbers by their value."""
    folder = epath.Path(workdir)
    if (folder / "config.json").exists() or not folder.is_dir():
        return [workdir]
    names = [each.name for each in folder.iterdir() if (each / "config.json").exists()]
    return [f"{workdir.rstrip('/')}/{name}" for name in sorted(names, key=_natural)] or [workdir]


def _natural(name: str) -> list[tuple[float, str]]:
    """A key by which 0.05 comes before 0.1, and 9 before 10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", name)
    return [(float(part) if place % 2 else 0.0, part) for place, part in enumerate(parts)]


_FEATURES = {"image_feature": "image", "caption_feature": "caption", "label_template": ""}  # with their defaults


def _names(workdirs: Sequence[str]) -> list[str]:
    parts = [[part for part in path.split("/") if part not in ("", ".")] or ["."] for path in workdirs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("report: the same --workdir is given twice; give each one once")


def _read_run(workdir: epath.Path, name: str, data: dict[tuple[str, str, bool, str, int, Features], Data | str]) -> Run:
    config = _read_config(workdir / "config.json")
    stages = stages_in(config) if config.get("train.stages") else ()
    last = {**config, **(stages[-1].settings if stages else {})}
    about = (
        bool(last.get("data.cached_latents")),
        str(last.get("data.source", "tfds")),
        int(last["data.resolution"]),
        Features(*(str(last.get(f"data.{name}", default)) for name, default in _FEATURES.items())),
    )
    where = (str(last["data.path"]), str(last["data.split"]), *about)
    if where not in data:
        data[where] = _measure(*where)
    samples = [_read_samples(path) for path in sorted((workdir / "samples").glob("*.json"))]
    by_step = [each for each in samples if re.fullmatch(r"step_\d+", each.name)]
    lines = _read_metrics(workdir)
    return Run(
        name=name,
        config=config,
        metrics=[line for line in lines if not _is_evaluation(line)],
        evaluations=[line for line in lines if _is_evaluation(line)],
        steps=sorted(by_step, key=lambda each: each.step),
        others=[each for each in samples if each not in by_step],
        data=data[where],
        seconds=read_goodput(workdir),
        stages=stages,
    )


def _read_config(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"report: {path} is missing; give the --workdir of a training, or of a sweep, that has begun")
    try:
        config, _ = read_json(path.read_text())
    except (ValueError, AttributeError) as error:
        raise UserError(f"report: {path} is not a JSON config ({error}); restore it from a backup") from error
    for name in ("noise.offset_strength", "data.path", "data.split"):
        if name not in config:
            raise UserError(f"report: {path} lacks {name}; give a work directory that offsetjax train made")
    return config


def _read_metrics(workdir: epath.Path) -> list[dict[str, float]]:
    """The lines of a record; the last one may be half written."""
    log = read_log(workdir)
    for number in log.unreadable:
        raise UserError(
            f"report: {workdir / 'metrics.jsonl'}, line {number} is not a step's metrics; resume the training, which "
            "sets such lines aside, or, of a finished one, move that line to metrics.unreadable"
        )
    return [{**line.values, "step": line.step} for line in log.lines]


def _is_evaluation(line: dict[str, float]) -> bool:
    return any(name.startswith(("validation_", "brightness_")) for name in line)


def _read_samples(path: epath.Path) -> Samples:
    picture = path.with_suffix(".png")
    try:
        values = parse_object(path.read_bytes())
        samples = Samples(
            name=path.stem,
            step=int(values["step"]),
            params=str(values["params"]),
            start_noise=str(values["start_noise"]),
            guidance_scale=float(values["guidance_scale"]),
            num_steps=int(values["num_steps"]),
            records=tuple(_read_record(record) for record in values["records"]),
            picture=picture if picture.exists() else None,
        )
        if not samples.records:
            raise ValueError("no records")
        if not all(math.isfinite(record.brightness) and 0 <= record.brightness <= 1 for record in samples.records):
            raise ValueError("a brightness that is not between 0 and 1")
        if samples.step < 0 or samples.num_steps < 1 or not math.isfinite(samples.guidance_scale):
            raise ValueError("a step, a number of steps or a guidance that cannot be")
        if is_damaged(values):
            raise ValueError("it is damaged: its digest is not the one that was written")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(
            f"report: {path} is not a record of samples ({reason}); draw it again, or move it away"
        ) from error
    return samples


def _read_record(record: dict[str, Any]) -> Record:
    box = None
    if "box" in record:
        left, top, right, bottom = map(int, record["box"])
        box = left, top, right, bottom
    return Record(str(record["prompt"]), int(record["seed"]), float(record["brightness"]), box)


def read_picture(path: epath.Path) -> Image.Image:
    """Decodes a PNG to RGB.

    Raises:
        UserError: a file that is not a picture.
    """
    try:
        data = path.read_bytes()
        Image.open(io.BytesIO(data)).verify()  # the checksums of a PNG's chunks, at which decoding does not look
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"report: {path} is not a readable picture; draw it again, or move it away") from error


def _measure(path: str, split: str, cached_latents: bool, kind: str, resolution: int, features: Features) -> Data | str:
    """Measures a data set, or says why it cannot: a report is often made where the data no longer are."""
    try:
        source = open_source(path, split, cached_latents, kind, features)
        captions = tuple(source[index].caption for index in evenly_spaced(source))
        return Data(len(source), captions, tuple(data_brightness(source, resolution).tolist()))
    except (UserError, OSError, KeyError, ValueError) as error:
        reason = one_line(error, most=2000)
        return f"the data set could not be measured ({reason})"
