"""Named things: ours, a program's own, and those of installed packages."""

import importlib.metadata

import pytest

from offsetjax.errors import UserError
from offsetjax.registry import Registry


@pytest.fixture
def registry() -> Registry:
    return Registry("model.family", "offsetjax.tests", {"json": "json:dumps"})


def test_ours_are_imported_by_their_place(registry: Registry) -> None:
    assert registry["json"]([1]) == "[1]"


def test_a_program_adds_its_own_but_cannot_replace_ours(registry: Registry) -> None:
    registry.register("toy", 7)
    assert registry["toy"] == 7 and registry.names == ("json", "toy") and "toy" in registry
    with pytest.raises(ValueError, match="'json' is a name of offsetjax itself"):
        registry.register("json", 7)


def test_an_installed_package_is_found_by_its_entry_point(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("other", "math:sqrt", "offsetjax.tests")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == point.group else [])
    assert registry["other"](9) == 3 and registry.names == ("json", "other")


@pytest.mark.parametrize(("name", "remedy"), [("jsn", "did you mean 'json'"), ("zzz", "known: json")])
def test_an_unknown_name_is_answered(registry: Registry, name: str, remedy: str) -> None:
    with pytest.raises(UserError, match=f"model.family = '{name}' is not known; {remedy}"):
        registry[name]
