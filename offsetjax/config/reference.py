"""The reference of all fields: on a terminal as tables, elsewhere as plain lines, and as the page `REFERENCE.md`."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from offsetjax.config.field import Change, Field, Section
from offsetjax.config.names import foreign_names, suggestion
from offsetjax.config.ranges import ANY
from offsetjax.config.schema import fields, sections
from offsetjax.errors import UserError

_INTRODUCTION = """\
# The fields of a config

Made by `offsetjax config --markdown`; do not edit. A config file changes fields, `config.noise.offset_strength = 0.1`,
and so does the command line, `--config.noise.offset_strength=0.1`. `offsetjax config NAME` shows a section, a field, or
what a setting of another trainer is called here.

A field marked ↻ may change when a run resumes. With ○ it may too, and no loss depends on it, but for rounding: in a
report it sets no runs apart. All others decide what a run learns, and stay.
"""
_MARKS = {Change.NEVER: "", Change.RESUME: " ↻", Change.FREELY: " ○"}


def show(name: str, console: Console) -> None:
    """Prints the fields of a section, one field, or that which another trainer calls so; without a name all of them.

    Raises:
        UserError: there is no such name; the nearest is suggested.
    """
    foreign, declared = foreign_names(), fields()
    if name in foreign and name not in declared:
        path = foreign[name]
        programs = declared[path].elsewhere[name]
        console.print(Text(f"{name} ({programs}) is called {path} here.\n"), soft_wrap=True)
        name = path
    if name in declared:
        console.print(Text("\n".join(card(name, declared[name]))), soft_wrap=True)
        return
    shown = [each for each in sections() if not name or each.path == name or each.path.startswith(f"{name}.")]
    if not shown:
        raise UserError(f"config: there is no field or section {name!r}; {suggestion(name)}")
    for section in shown:
        console.print(_table(section) if console.is_terminal else Text("\n".join(_lines(section))), soft_wrap=True)


def card(path: str, field: Field) -> Iterator[str]:
    """All that is known of a field, in lines."""
    yield path
    yield f"  {field.meaning}"
    yield f"  type      {field.type_name}" + (f", in {field.unit}" if field.unit else "")
    yield f"  default   {field.default!r}"
    if field.range is not ANY:
        yield f"  range     {field.range.words}"
    yield f"  changes   {(field.change or Change.NEVER).value}"
    if field.elsewhere:
        yield f"  elsewhere {_elsewhere(field)}"


def _elsewhere(field: Field) -> str:
    return ", ".join(f"{name} ({programs})" for name, programs in field.elsewhere.items())


def _title(section: Section) -> str:
    return section.path or "(of the config itself)"


def _lines(section: Section) -> Iterator[str]:
    yield f"{_title(section)}: {section.meaning}"
    for path, field in section.by_path.items():
        yield ""
        yield from (f"  {line}" for line in card(path, field))
    yield ""


def _table(section: Section) -> Table:
    table = Table(title=f"{_title(section)}: {section.meaning}", title_justify="left", show_lines=True, expand=True)
    for name, ratio in (("field", 3), ("default", 2), ("range", 2), ("meaning", 4), ("elsewhere", 3)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for path, field in section.by_path.items():
        unit = f" [{field.unit}]" if field.unit else ""
        range = field.type_name if field.range is ANY else f"{field.type_name}, {field.range.words}"
        cells = (f"{path}{_mark(field)}", f"{field.default!r}", range, f"{field.meaning}{unit}", _elsewhere(field))
        table.add_row(*map(Text, cells))
    return table


def _mark(field: Field) -> str:
    return _MARKS[field.change or Change.NEVER]


def page(shown: Sequence[Section]) -> str:
    """The reference in Markdown."""
    return "\n".join([_INTRODUCTION, *(line for section in shown for line in _markdown(section))])


def _markdown(section: Section) -> Iterator[str]:
    yield f"## {_title(section)}"
    yield ""
    yield section.meaning
    yield ""
    yield "| field | type and range | default | meaning | elsewhere |"
    yield "|---|---|---|---|---|"
    for path, field in section.by_path.items():
        range = "" if field.range is ANY else f": {field.range.words}"
        unit = f" ({field.unit})" if field.unit else ""
        cells = (
            f"`{path}`{_mark(field)}",
            f"{field.type_name}{range}",
            f"`{field.default!r}`",
            f"{field.meaning}{unit}",
        )
        yield "| " + " | ".join((*cells, _elsewhere(field))) + " |"
    yield ""
