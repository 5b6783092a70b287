"""README's map of the house has every module and package, and none that is gone."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_the_map_is_complete() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## The map of the house\n")[2].partition("\n## ")[0]
    drawn = {word for line in re.findall(r"^    .*", section, re.MULTILINE) for word in line.split()}
    modules = {file.name for file in (ROOT / "offsetjax").glob("[!_]*.py")}
    packages = {f"{file.parent.name}/" for file in (ROOT / "offsetjax").glob("*/__init__.py")}
    assert {word for word in drawn if re.fullmatch(r"\w+(\.py|/)", word)} == modules | packages
