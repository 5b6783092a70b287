"""What a training reads: the protocols of a data set and of its records, and how one is opened by its kind.

Another kind of data set is a class with these four methods and a function that opens it, which
`SOURCES.register(name, function)` makes known to `data.source`; nothing else of the program asks what a source is.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from offsetjax.config.mix import parts_of
from offsetjax.config.registries import SOURCES
from offsetjax.data.buckets import Size
from offsetjax.data.images import CENTRE, UnreadableImage
from offsetjax.data.mixed import Mixed, mixed
from offsetjax.errors import UserError


class Record(Protocol):
    """One example: its caption and name, and what a training sees of it.

    `offsetjax.data.record.Picture` is one that most sources can give.
    """

    @property
    def caption(self) -> str: ...

    @property
    def name(self) -> str: ...

    def view(self, size: Size, is_mirrored: bool) -> Mapping[str, np.ndarray]:
        """The example's fields of a batch, cropped and scaled to `size`.

        With a further parameter, `place`, it also takes `data.random_crop`: where the crop is, from 0, at the left or
        the top, over 0.5, the middle, to 1.

        Returns:
            `pixels` uint8 `[size.height, size.width, 3]`, or `moments` float16 `[2, c, h, w]` of its latents; and
            `time_ids` float32 `[6]`, SDXL's micro-conditioning (see `offsetjax.data.images.time_ids`).

        Raises:
            UnreadableImage: it cannot be decoded.
        """

    def brightness(self, size: Size) -> float:
        """The mean of the cropped picture's values, 0 black and 1 white.

        Raises:
            UnreadableImage: it cannot be decoded.
        """


class Source(Protocol):
    """Random access to the examples of one split of a data set.

    Attributes:
        label: the data set and the split, for messages.
    """

    @property
    def label(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record of that number.

        Raises:
            UserError: it cannot be read.
        """

    def fingerprint(self) -> Mapping[str, Any]:
        """What identifies these examples in this order; JSON holds it unchanged."""

    def shares_records(self, other: "Source") -> bool:
        """Whether an example is in both; False where the two are of different kinds."""


@dataclass(frozen=True)
class Features:
    """Which features of a record are read; each has the name that the config gives it, `data.image_feature` and so on.

    Attributes:
        image, caption: their names; `captions/text` is one within another.
        label_template: the caption of a class, where `{label}` is its name; "": captions are texts.
    """

    image: str = "image"
    caption: str = "caption"
    label_template: str = ""


USUAL = Features()
_SETTINGS = {"image": "image_feature", "caption": "caption_feature", "label_template": "label_template"}


class Opener(Protocol):
    """Opens a kind of source: the path and the split are those of the config.

    With a further parameter, `features`, it also takes those that the config names.
    """

    def __call__(self, path: str, split: str) -> Source: ...


def open_source(
    path: epath.PathLike,
    split: str = "train",
    cached_latents: bool = False,
    kind: str = "tfds",
    features: Features = USUAL,
) -> Source:
    """Opens a data set for random access.

    Args:
        path: as its kind takes it.
        split: by the kind's rules; of TFDS: `train`, `train[:90%]`.
        cached_latents: it is what `offsetjax data encode` wrote, whatever the kind of its pictures.
        kind: a name of `SOURCES`.
        features: those that are read.

    Raises:
        UserError: an unknown kind, or one that has no features to name; no data set, or a damaged one; an unknown or
            empty split.
    """
    opener: Opener = SOURCES["latents" if cached_latents else kind]
    if "features" in inspect.signature(opener).parameters:
        source = opener(str(path), split, features=features)  # type: ignore[call-arg]
    elif given := [name for name, value in vars(features).items() if value != getattr(USUAL, name)]:
        what = "data.cached_latents, which have captions" if cached_latents else f"data.source = {kind!r}"
        raise UserError(f"config: data.{_SETTINGS[given[0]]} cannot apply with {what}; leave it out")
    else:
        source = opener(str(path), split)
    if not len(source):
        raise UserError(f"data: {source.label} is empty")
    return source


def open_data(data: ConfigDict, split: str | None = None) -> Source:
    """Opens what the section `data` of a config says; another split of it where one is given.

    Raises:
        UserError: as for `open_source`.
    """
    if data.mix:
        return _open_mix(data, split)
    split = data.split if split is None else split
    return open_source(data.path, split, data.cached_latents, data.source, features_of(data))


def _open_mix(data: ConfigDict, split: str | None) -> Mixed:
    sources, parts = [], parts_of(tuple(data.mix))
    for number, part in enumerate(parts, start=1):
        own = data.copy_and_resolve_references()
        own.update({"mix": (), **part.data})
        try:
            sources.append(open_data(own, split))
        except UserError as error:
            raise UserError(f"{error} (data.mix, data set {number})") from error
    weights, repeats = [part.weight for part in parts], [part.repeats for part in parts]
    return mixed(sources, weights, repeats, [part.captions for part in parts])


def features_of(data: ConfigDict) -> Features:
    """Those that the section `data` of a config names."""
    return Features(data.image_feature, data.caption_feature, data.label_template)


def describe(source: Source, index: int) -> str:
    """Which record of which data set it is, for a message."""
    if isinstance(source, Mixed):
        number, index = source.located(index)
        source = source.sources[number]
    return f"record {index} ({source[index].name or 'without a name'}) of {source.label}"


def seen(
    source: Source, index: int, record: Record, size: Size, is_mirrored: bool = False, place: float = CENTRE
) -> dict[str, Any]:
    """What training sees of the record of that number: the fields of `Record.view`.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        if place == CENTRE:
            return dict(record.view(size, is_mirrored))
        return dict(record.view(size, is_mirrored, place=place))  # type: ignore[call-arg]
    except UnreadableImage as error:
        raise unreadable(source, index, error) from error


def check_crops(source: Source) -> None:
    """Refuses random crops where records have the central ones alone.

    Raises:
        UserError: they have.
    """
    for each in source.sources if isinstance(source, Mixed) else (source,):
        if "place" in inspect.signature(each[0].view).parameters:
            continue
        raise UserError(
            f"config: data.random_crop cannot apply to {each.label}, whose records are cropped at their centres; "
            "leave it out"
        )


def unreadable(source: Source, index: int, error: UnreadableImage) -> UserError:
    """The message about a record that is no picture."""
    return UserError(
        f"data: {describe(source, index)} is no picture: {error}; build the data set again with `offsetjax data build`"
    )


def captions(source: Source) -> list[str]:
    """The caption of every record, in the order of the source."""
    return [source[index].caption for index in range(len(source))]


def split_names(split: str) -> set[str]:
    """The whole splits that a split is of: `train` and `test` for `train[:95%]+test`."""
    return {part.partition("[")[0].strip() for part in split.split("+")}
