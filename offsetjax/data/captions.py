"""The captions of one picture, out of the file beside it or out of named fields.

Of several fields a caption is `text`, `caption` or `prompt`, the first that is there, or a list of texts for several
captions; `captions` is one too. Where there is none of them, `tags` are one caption.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from offsetjax.data.items import MAX_CAPTION_BYTES, Dropped
from offsetjax.errors import UserError
from offsetjax.json_text import parse_object

# Which lines of a text file are captions: kohya's scripts read the first, others the whole, or each as one.
TextLines = Literal["whole", "first", "each"]

SIDE_SUFFIXES = (".txt", ".caption", ".json")  # the first that is there is read
FIELDS = ("text", "caption", "prompt", "captions")


def captions_of(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions among the fields of a picture, stripped; none is an empty tuple.

    Raises:
        Dropped: what has the name of a caption is no text, or cannot be written.
    """
    value = next((fields[name] for name in FIELDS if fields.get(name) is not None), None)
    if value is None:
        value = fields.get("tags") or ""
        value = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    several = value if isinstance(value, list | tuple) else [value]
    for each in several:
        if not isinstance(each, str):
            raise Dropped(f"the caption is no text: {str(each)[:40]!r}")
    return tuple(_checked(each) for each in several if each.strip())


def _checked(caption: str) -> str:
    if len(caption) > MAX_CAPTION_BYTES:
        raise Dropped(f"the caption is longer than {MAX_CAPTION_BYTES} characters")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise Dropped("the caption cannot be written: it has half of a surrogate pair") from None
    return caption.strip()


def read_side_file(file: pathlib.Path, lines: TextLines) -> tuple[str, ...]:
    """The captions in the file of one picture; none where it holds none.

    Raises:
        Dropped: it is too long, or not what its suffix says.
    """
    with file.open("rb") as opened:
        return side_captions(opened.read(MAX_CAPTION_BYTES + 1), file.suffix, lines)


def side_captions(content: bytes, suffix: str, lines: TextLines) -> tuple[str, ...]:
    """The captions in the content of such a file, with the suffix of its name.

    Raises:
        Dropped: as for `read_side_file`.
    """
    if len(content) > MAX_CAPTION_BYTES:
        raise Dropped(f"the caption's file is longer than {MAX_CAPTION_BYTES} bytes")
    try:
        if suffix.lower() == ".json":
            return captions_of(parse_object(content, takes_nan=True))
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Dropped("the caption's file is not UTF-8 text") from None
    except ValueError as error:
        raise Dropped(f"the caption's file is not a JSON object: {error}") from None
    kept = _LINES[lines](text.replace("\r\n", "\n"))
    return captions_of({"captions": kept})


_LINES: dict[str, Callable[[str], list[str]]] = {
    "whole": lambda text: [text],
    "first": lambda text: [line for line in text.split("\n") if line.strip()][:1],
    "each": lambda text: [line for line in text.split("\n") if line.strip()],
}


def of_label(template: str, label: str) -> str:
    """The caption of a picture of a class: "a photo of a {label}"."""
    return template.replace("{label}", label)


def check_template(name: str, template: str) -> None:
    """Raises a UserError unless a template has a place for the label.

    Args:
        name: of the option, or the field, that gives it.
    """
    if "{label}" not in template:
        raise UserError(f"{name} = {template!r} has no place for the label; write it as 'a photo of a {{label}}'")
