"""Fields in a text, written as the command line writes them: `data.path=a data.weight=2`."""

import re
from collections.abc import Callable
from typing import Any

from offsetjax.config.names import suggestion
from offsetjax.config.schema import fields
from offsetjax.config.values import check, from_text, shown
from offsetjax.errors import UserError


def settings_in(text: str, where: str, example: str, refused: Callable[[str], str]) -> dict[str, Any]:
    """The fields of a text, each once, of its type and in its range.

    Args:
        where: the text stands, for messages.
        example: of such a text.
        refused: why a field cannot be in it, by its path; "": it can.

    Raises:
        UserError: a text of another form, an unknown field, or one that cannot be in it.
    """
    settings: dict[str, Any] = {}
    for part in re.split(r"\s+(?=[a-z_0-9.]+\.[a-z_0-9]+=)", text.strip()):
        path, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"config: {where}: {shown(part)} sets no field; write fields such as {example!r}")
        field = fields().get(path)
        if field is None:
            raise UserError(f"config: {where}: unknown key {shown(path)}; {suggestion(path)}")
        if why := refused(path):
            raise UserError(f"config: {where}: {path} {why}")
        if path in settings:
            raise UserError(f"config: {where}: {path} is given twice; leave one of them out")
        if field.type is str and value[:1] in ("'", '"') and value[:1] == value[1:][-1:]:
            value = value[1:-1]  # as a shell does: what is between them may begin or end with a space
        try:
            settings[path] = from_text(path, field, value)
            check(path, field, settings[path])
        except UserError as error:
            raise UserError(f"config: {where}: {str(error).removeprefix('config: ')}") from error
    return settings
