"""Overrides and configs of any content: a value of the field's type, or one line; never long, never a stack trace."""

import math
import pathlib
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from offsetjax.config import assign, default_config, flatten, load_config, override, schema, validate
from offsetjax.errors import UserError

FIELDS = schema.fields()
PATHS = sorted(FIELDS)
ODD = st.sampled_from(
    [
        *(
            "-" * 3000 + "1",
            "(" * 500,
            "[" * 5000,
            "{" * 300,
            "1" * 5000,
            "10**400",
            "9**9**9",
            "1e400",
            "-1e-400",
            "nan",
        ),
        *("'" * 999, "\0", "\ud83d", "\u2028", "\x1b]0;x", "__import__('os')", "None", "True", "()", "(())", "('a',)"),
        *("('a', None)", "(1, 'a')", "(0.1,)", "1_000", "0x10", "1j", "...", "a" * 20_000, "", " ", "\n", "f(f)" * 200),
    ]
)
TEXTS = ODD | st.text(max_size=50) | st.integers().map(str) | st.floats().map(repr)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(), inner)
    ),
    max_leaves=5,
)


def _settled(config: Any) -> str:
    """The line with which a config is refused; "" where it is accepted, with each value in its range."""
    begin = time.monotonic()
    try:
        validate(config)
        message = ""
    except UserError as error:
        message = str(error)
    assert "\n" not in message and len(message) < 3000
    assert time.monotonic() - begin < 2
    if not message:
        for path, value in flatten(config):
            assert FIELDS[path].has_type(value) and FIELDS[path].holds(value)
            assert not isinstance(value, float) or math.isfinite(value)
    return message


def _override(path: str, text: str) -> None:
    config, begin, message = default_config(), time.monotonic(), ""
    try:
        override(config, path, text)
    except UserError as error:
        message = str(error)
    assert "\n" not in message and len(message) < 3000
    if not message:
        _settled(config)
    assert time.monotonic() - begin < 2


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
FULL = settings(QUICK, max_examples=1000)


@pytest.mark.parametrize("text", ["-" * 3000 + "1", "10**400", "1" * 5000, "(" * 5000, "9**9**9", "f(" * 300, "\0"])
@pytest.mark.parametrize("path", ["seed", "optimizer.learning_rate", "sample.prompts", "noise.spectrum", "data.path"])
def test_an_override_that_once_hung_or_failed(path: str, text: str) -> None:
    _override(path, text)


@QUICK
@given(st.sampled_from(PATHS) | st.text(max_size=40), TEXTS)
@example("model.unet.block_out_channels", "(-1, True)")
def test_any_override_is_of_its_type_or_one_line(path: str, text: str) -> None:
    _override(path, text)


@pytest.mark.slow
@FULL
@given(st.sampled_from(PATHS) | st.text(max_size=40), TEXTS)
def test_any_override_is_of_its_type_or_one_line_1000(path: str, text: str) -> None:
    _override(path, text)


def _whole(changes: dict[str, Any]) -> None:
    config = default_config()
    for path, value in changes.items():
        try:
            assign(config, path, value)
        except (TypeError, ValueError, OverflowError):  # the dictionary's own, which a file reports in one line
            return
    _settled(config)


@QUICK
@given(st.dictionaries(st.sampled_from(PATHS), VALUES, max_size=4))
def test_any_config_is_in_its_ranges_or_one_line(changes: dict[str, Any]) -> None:
    _whole(changes)


@pytest.mark.slow
@FULL
@given(st.dictionaries(st.sampled_from(PATHS), VALUES, max_size=4))
def test_any_config_is_in_its_ranges_or_one_line_1000(changes: dict[str, Any]) -> None:
    _whole(changes)


@pytest.mark.parametrize(
    "body",
    [
        "config.optimizer.learning_rate = 10**400",
        "config.train.steps = 10**5000",
        "config.noise = 3",
        "config.model.unet = {}",
        "config.noise = {'offset_strength': 0.1}",
        "config.unlock(); config.x = 1",
        "config.unlock(); config.__dict__['_fields'].pop('noise')",
        "import sys; sys.exit(3)",
        "raise RuntimeError('a\\nb')",
        "config = config.to_dict()",
        "def f(): return f()\n    f()",
    ],
)
def test_whatever_a_file_does_is_one_line(body: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "c.py").write_text(
        "from offsetjax.config import default_config\ndef get_config():\n    config = default_config()\n"
        f"    {body}\n    return config\n"
    )
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path / "c.py"))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("config: ")
