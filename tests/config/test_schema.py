"""Fields are declared once: what is derived from the declarations holds for each of them."""

import contextlib
import functools
import json
import pathlib
import pickle
import re
from collections.abc import Callable
from typing import Any, get_args, get_origin

import pytest
from ml_collections import ConfigDict
from rich.console import Console

from offsetjax.cli import main
from offsetjax.config import (
    assign,
    default_config,
    flatten,
    from_json,
    is_explicit,
    is_indifferent,
    load_config,
    may_change_on_resume,
    override,
    reference,
    schema,
    to_json,
    validate,
)
from offsetjax.config.field import Change, Field, Section
from offsetjax.config.names import foreign_names
from offsetjax.config.ranges import above
from offsetjax.errors import UserError
from offsetjax.registry import Registry

REFERENCE = pathlib.Path(schema.__file__).with_name("REFERENCE.md")
FIELDS = schema.fields()
# One value of every kind that Python has; each field takes the kinds of its default and no other.
OTHERS: tuple[Any, ...] = (
    *(None, True, 3, 0.5, "a text", b"bytes", (), (1,), (0.5,), ("a",), (None,), [1], {"a": 1}, {1}, object()),
    *(float("nan"), 10**400, 1j, "\ud83d", "a\0b", ("\ud83d",), ((1,),), type, lambda: 0),
)


@pytest.mark.parametrize("path", FIELDS)
def test_a_default_is_of_its_type_and_in_its_range(path: str) -> None:
    field = FIELDS[path]
    assert field.has_type(field.default) and field.holds(field.default) and field.has_type(field.example)
    assert field.meaning and field.range.words and "\n" not in field.meaning
    if get_origin(field.type) is None and type(field.default) is not tuple:
        assert field.type is type(field.default)


@pytest.mark.parametrize("path", FIELDS)
def test_a_value_of_another_type_is_one_line(path: str) -> None:
    for value in OTHERS:
        config = default_config()
        with contextlib.suppress(OverflowError):  # the dictionary makes floats of whole numbers
            assign(config, path, value)
        if message := _refusal(lambda config=config: validate(config)):
            assert message.startswith("config: ") and "\n" not in message
        else:  # the dictionary makes a number of True, as Python does
            assert _is_of(FIELDS[path].type, dict(flatten(config))[path]), f"{path} = {value!r} was accepted"


def _refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def _is_of(kind: Any, value: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(get_args(kind)[0], each) for each in value)
    numbers = {int: int, float: int | float}
    return isinstance(value, numbers.get(kind, kind)) and (kind is bool or not isinstance(value, bool))


@pytest.mark.parametrize("path", FIELDS)
def test_none_in_a_file_is_one_line(path: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "c.py").write_text(
        f"from offsetjax.config import default_config\ndef get_config():\n    config = default_config()\n"
        f"    config.{path} = None\n    return config\n"
    )
    with pytest.raises(UserError, match=re.escape(f"config: {path} = None must be of type ")):
        load_config(str(tmp_path / "c.py"))


def test_a_truth_is_no_number() -> None:
    config = default_config()
    for section, name in ((config.encode, "caption_dropout"), (config.train, "steps")):
        with pytest.raises(TypeError, match=f"{name}.* is a number"):
            section[name] = True


def test_each_foreign_name_stands_for_one_field_and_is_none_of_ours() -> None:
    names = [name for field in FIELDS.values() for name in field.elsewhere]
    assert len(names) == len(set(names)) == len(foreign_names())
    assert set(names).isdisjoint(FIELDS)
    assert foreign_names()["noise_offset"] == "noise.offset_strength"
    assert foreign_names()["train_text_encoder"] == "train.text_encoders"


def test_no_loss_depends_on_a_field_that_a_resume_may_not_change() -> None:
    """The one that would is a contradiction: what sets runs apart for no loss may be changed at any time."""
    assert {path for path in FIELDS if is_indifferent(path)} < {path for path in FIELDS if may_change_on_resume(path)}
    assert not may_change_on_resume("optimizer.learning_rate") and not is_indifferent("no.such.field")


def test_the_reference_is_current() -> None:
    page = REFERENCE.read_text(encoding="utf-8")
    assert page == reference.page(schema.sections()), "run: offsetjax config --markdown > …/config/REFERENCE.md"
    assert all(f"| `{path}`" in page for path in FIELDS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("noise.offset_strength", ("noise.offset_strength", "default   0.0", "noise_offset (kohya")),
        ("noise_offset", ("is called noise.offset_strength here", "default   0.0")),
        ("model", ("model.pretrained", "model.unet.block_out_channels", "default   (320, 640, 1280, 1280)")),
        ("train.steps", ("max_train_steps", "when a run resumes")),
        ("", ("seed", "probe.prompts", "[", "one of ddim, ddpm")),
    ],
)
def test_the_command_shows_a_section_a_field_or_what_others_call_so(
    name: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", *([name] if name else [])]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)
    assert not (name == "model" and "lora.rank" in printed)


def test_the_command_answers_a_name_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "noise.ofset"]) == 2
    assert "no field or section 'noise.ofset'; did you mean noise.offset_strength?" in capsys.readouterr().err


def test_a_terminal_gets_a_table() -> None:
    console = Console(force_terminal=True, width=200, color_system=None)
    with console.capture() as captured:
        reference.show("mesh", console)
    assert "│ mesh.fsdp ○" in captured.get()


class TestWhatWasSet:
    """A value that is the default is a statement where it was set."""

    def test_a_file_sets_and_so_does_an_override(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "c.py").write_text(
            "from offsetjax.config import default_config\ndef get_config():\n    config = default_config()\n"
            "    config.schedule.prediction_type = 'epsilon'\n    config.train.update(steps=1000)\n    return config\n"
        )
        config = load_config(str(tmp_path / "c.py"), [("noise.offset_strength", "0.0")])
        stated = {path for path in FIELDS if is_explicit(config, path)}
        assert stated == {"schedule.prediction_type", "train.steps", "noise.offset_strength"}

    def test_copies_pickles_and_json_remember(self) -> None:
        config = default_config()
        config.loss.kl_weight = 1e-6
        for copy in (
            config.copy_and_resolve_references(),
            pickle.loads(pickle.dumps(config)),
            from_json(to_json(config)),
        ):
            assert [path for path in FIELDS if is_explicit(copy, path)] == ["loss.kl_weight"] and copy == config

    def test_what_is_filled_in_is_no_statement_and_takes_none_away(self) -> None:
        config = default_config()
        assign(config, "lora.rank", 8, explicit=False)
        assert config.lora.rank == 8 and not is_explicit(config, "lora.rank")
        override(config, "lora.rank", "4")
        assign(config, "lora.rank", 8, explicit=False)
        assert config.lora.rank == 8 and is_explicit(config, "lora.rank") and config.is_locked

    def test_json_of_an_earlier_version_states_nothing(self) -> None:
        stored = json.loads(to_json(default_config()))
        del stored["explicit"]
        config = from_json(json.dumps(stored))
        assert config == default_config() and not any(is_explicit(config, path) for path in FIELDS)


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> Registry[Section]:
    registry: Registry[Section] = Registry("section", "offsetjax.no_such_group", schema._OWN)
    monkeypatch.setattr(schema, "SECTIONS", registry)
    return registry


def test_another_program_declares_fields_of_its_own(strangers: Registry[Section], tmp_path: pathlib.Path) -> None:
    shift = Field("shift", float, 1.0, above(0), "of the timesteps", elsewhere={"discrete_flow_shift": "kohya"})
    strangers.register("process.toy", Section("process.toy", "A toy.", (shift,), change=Change.FREELY))
    config = default_config()
    assert isinstance(config, ConfigDict) and config.process.toy.shift == 1.0
    override(config, "process.toy.shift", "3")
    validate(config)
    assert from_json(to_json(config)).process.toy.shift == 3.0
    assert may_change_on_resume("process.toy.shift") and is_indifferent("process.toy.shift")
    assert "process.toy.shift" in reference.page(schema.sections())
    assert "process.toy.shift" not in REFERENCE.read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"it is called process\.toy\.shift here"):
        override(config, "discrete_flow_shift", "3")
    override(config, "process.toy.shift", "-1")
    with pytest.raises(UserError, match=r"process\.toy\.shift = -1\.0 must be above 0"):
        validate(config)
    with pytest.raises(ValueError, match="'train' is a name of offsetjax itself"):
        strangers.register("train", Section("train", "", ()))


def test_a_stored_config_is_read_by_type() -> None:
    """Every kind of JSON value in every field: it is the field's type, or one line (C6)."""
    for path, field in FIELDS.items():
        for value in (None, True, 3, 0.5, 10**400, "a", [1], ["a"], [None], {"a": 1}, [[1]], {}, float("nan")):
            text = json.dumps(functools.reduce(lambda tree, name: {name: tree}, reversed(path.split(".")), value))
            try:
                message = _refusal(lambda text=text: from_json(text))
            except ValueError as error:  # what is no JSON, or no number that a config can have; who reads it adds where
                message = str(error)
                assert value == 10**400 or value != value
            assert "\n" not in message and len(message) < 300
            assert message or field.has_type(dict(flatten(from_json(text)))[path])


@pytest.mark.parametrize(
    "text",
    [
        '{"__class__": 1}',
        '{"train": {"__class__": 1}}',
        '{"train": 3}',
        '{"train": [1]}',
        '{"explicit": 3}',
        '{"explicit": [{}]}',
        '{"": 1}',
        '{"train.steps": 1}',
        "[" * 100_000,
        "[]",
        "3",
        "",
    ],
)
def test_a_stored_config_of_another_shape_is_one_error(text: str) -> None:
    with pytest.raises((UserError, ValueError)):
        from_json(text)


def test_the_command_checks_a_file_and_lists_what_it_sets(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(pathlib.Path(__file__).parents[2] / "configs" / "sd15_offset.py")
    assert main(["config", f"--config={file}", "--config.train.steps=7"]) == 0
    printed = capsys.readouterr().out
    assert "train.steps = 7\n" in printed and "noise.pyramid_levels" not in printed
    assert main(["config", f"--config={file}", "--config.train.steps=0"]) == 2
