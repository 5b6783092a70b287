"""Several data sets in one training: each text of `data.mix` is one, with what is said of it alone.

    config.data.mix = (
        "data.path=photos data.weight=3",
        "data.path=drawings data.weight=1 captions.prefix='a drawing of '",
        "data.path=gs://bucket/styles data.split=train[:90%] data.weight=1 captions.trigger=sks",
    )

What a text does not say is as the config has it. With weights these are the shares of the examples; without, each
picture comes `data.repeats` times an epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offsetjax.config.texts import settings_in
from offsetjax.errors import UserError

_EXAMPLE = "data.path=photos data.weight=2"
_OF_DATA = ("path", "split", "source", "image_feature", "caption_feature", "label_template", "weight", "repeats")
_CAPTIONS = "captions."


@dataclass(frozen=True)
class Part:
    """A data set of a mix.

    Attributes:
        data: what is said of it, by the names of the section `data`.
        captions: the same of the section `captions`.
    """

    data: Mapping[str, Any]
    captions: Mapping[str, Any]

    @property
    def weight(self) -> float:
        """Its share of the examples, over the sum of all; 0: it has none."""
        return float(self.data.get("weight", 0.0))

    @property
    def repeats(self) -> int:
        """How often each of its pictures comes in an epoch, where nothing is weighted."""
        return int(self.data.get("repeats", 1))


def parts_of(texts: tuple[str, ...]) -> tuple[Part, ...]:
    """The data sets of a mix.

    Raises:
        UserError: a text that is none, or weights of some and not of others.
    """
    parts = []
    for number, text in enumerate(texts, start=1):
        where = f"data.mix, data set {number}"
        settings = settings_in(text, where, _EXAMPLE, _refused)
        if not settings.get("data.path"):
            raise UserError(f"config: {where}: it has no data.path; write it such as {_EXAMPLE!r}")
        if settings.get("data.weight") and "data.repeats" in settings:
            raise UserError(f"config: {where}: data.weight and data.repeats both say how often it comes; leave one out")
        data = {name: settings[f"data.{name}"] for name in _OF_DATA if f"data.{name}" in settings}
        parts.append(
            Part(
                data,
                {path.removeprefix(_CAPTIONS): each for path, each in settings.items() if path.startswith(_CAPTIONS)},
            )
        )
    if any(part.weight for part in parts) and not all(part.weight for part in parts):
        number = next(number for number, part in enumerate(parts, start=1) if not part.weight)
        raise UserError(f"config: data.mix, data set {number}: it has no data.weight, but others have; give each one")
    return tuple(parts)


def _refused(path: str) -> str:
    if path.startswith(_CAPTIONS) or path.removeprefix("data.") in _OF_DATA:
        return ""
    return f"is of the whole mix; of one data set are {', '.join(f'data.{name}' for name in _OF_DATA)} and {_CAPTIONS}*"
