"""The features of a TFDS data set that are read: which they are, of what kind, and what captions they give."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from offsetjax.data.captions import check_template, of_label
from offsetjax.data.source import USUAL, Features
from offsetjax.errors import UserError

_OTHERS = "captions"  # beside a caption, further ones, as `offsetjax data build` writes them


@dataclass(frozen=True)
class CaptionOf:
    """Where a record has its captions.

    Attributes:
        path: the names of features, each within the one before.
        classes: the names of the classes, where it is one.
        template: the caption of a class, "a photo of a {label}", or ""; of a text too.
        has_others: whether `captions` has further ones.
    """

    path: tuple[str, ...]
    classes: tuple[str, ...] = ()
    template: str = ""
    has_others: bool = False

    def read(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The captions of a record, the first first.

        Raises:
            LookupError: it is of no class, or has an empty list of captions.
        """
        value: Any = row
        for name in self.path:
            value = value[name]
        if self.classes:
            if not 0 <= int(value) < len(self.classes):
                raise LookupError(f"has no class: {int(value)}")
            value = self.classes[int(value)].replace("_", " ")
        found = tuple(map(text, value if isinstance(value, list | tuple | np.ndarray) else [value]))
        if not found:
            raise LookupError("has no caption: its list is empty")
        if self.template:
            found = tuple(of_label(self.template, each) for each in found)
        return (*found, *map(text, row[_OTHERS])) if self.has_others else found


def text(value: bytes | str) -> str:
    """A feature's text; what is not UTF-8 becomes the character that stands for it."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def caption_of(folder: epath.Path, features: Mapping[str, Any], wanted: Features) -> CaptionOf:
    """Where the captions of a data set are.

    Raises:
        UserError: the template has no place for a label, or there is a class and no template.
    """
    if wanted.label_template:
        check_template("config: data.label_template", wanted.label_template)
    feature = _find(features, wanted.caption)
    classes: tuple[str, ...] = ()
    if isinstance(feature, tfds.features.ClassLabel):
        classes = tuple(feature.names)
        if not wanted.label_template:
            raise UserError(
                f"data: {folder} has the feature {wanted.caption!r} as classes, such as {classes[0]!r}; set "
                "data.label_template='a photo of a {label}'"
            )
    is_ours = wanted.caption == USUAL.caption and _is_texts(_find(features, _OTHERS))
    return CaptionOf(tuple(wanted.caption.split("/")), classes, wanted.label_template, is_ours)


def check_features(folder: epath.Path, features: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """Raises a UserError unless the features are there, and are what they are to be.

    Args:
        kinds: by the name of a feature, one of `image`, `moments`, `text` and `caption`.
    """
    for name, wanted in kinds.items():
        feature = _find(features, name)
        if feature is None:
            found = ", ".join(f"{each} ({type(kind).__name__})" for each, kind in sorted(features.items()))
            settings = "; or name those that it has as data.image_feature and data.caption_feature"
            raise UserError(
                f"data: {folder} has no feature {name!r}; it must have {' and '.join(kinds)}, and has {found[:300]}"
                + (settings if wanted in ("image", "caption") else "")
            )
        kind, is_kind = _KINDS[wanted]
        if not is_kind(feature):
            found = " ".join(repr(feature).split())
            raise UserError(
                f"data: {folder} has the feature {name!r} as {found}, but it must be {kind}; prepare the data with one"
            )


def _find(features: Mapping[str, Any], path: str) -> Any:
    """The feature of a path, `captions/text`; one in a sequence of several counts as a sequence of it."""
    found: Any = features
    is_sequence = False
    for name in path.split("/"):
        if isinstance(found, tfds.features.Sequence):
            is_sequence, found = True, found.feature
        found = found[name] if isinstance(found, Mapping | tfds.features.FeaturesDict) and name in found else None
    return tfds.features.Sequence(found) if is_sequence and found is not None else found


def _is_text(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Tensor) and (feature.shape, feature.np_dtype) == ((), np.object_)


def _is_texts(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Sequence) and _is_text(feature.feature)


def _is_caption(feature: Any) -> bool:
    return isinstance(feature, tfds.features.ClassLabel) or _is_text(feature) or _is_texts(feature)


# What a feature has to be, in TFDS's words, and whether it is.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "image": ("an Image", lambda feature: isinstance(feature, tfds.features.Image)),
    "moments": ("a Tensor", lambda feature: isinstance(feature, tfds.features.Tensor)),
    "text": ("a Text", _is_text),
    "caption": ("a Text, a Sequence of them or a ClassLabel", _is_caption),
}
