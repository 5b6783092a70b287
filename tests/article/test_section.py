"""The re-enactment's part of a report: the article's figures, and sentences that turn when the figures do."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from offsetjax.article.section import article_section
from tests.report.test_report import GREY, LOGO, SKI, SQUARE, WIDE, _run, _workdir, data

__all__ = ["data"]  # a fixture


def _report(out: pathlib.Path, *workdirs: str) -> tuple[dict[str, Any], str]:
    return _run(out, *workdirs, sections=[article_section()])


def test_the_article_s_figures_are_in_the_numbers_and_on_the_page(tmp_path: pathlib.Path, data: Any) -> None:
    numbers, html = _report(tmp_path, _workdir(tmp_path / "fine", 0.1, {0: GREY, 100: WIDE}))
    assert numbers["article"]["brightness"]["logo"] == {"before": 0.709, "after": 0.974}
    assert "“The article”: N. Guttenberg" in html


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (WIDE, "3 of 3 prompts move by .05 or more in the direction"),
        ({SQUARE: (0.9,), SKI: (0.7,), LOGO: (0.52,)}, "1 of 3 prompts move by .05 or more in the direction"),
    ],
)
def test_the_directions_are_counted(
    tmp_path: pathlib.Path, data: Any, after: Mapping[str, Sequence[float]], expected: str
) -> None:
    numbers, _ = _report(tmp_path, _workdir(tmp_path / "fine", 0.1, {0: GREY, 100: after}))
    assert expected in " ".join(numbers["conclusions"])


@pytest.mark.parametrize(
    ("plain", "offset", "expected"),
    [
        ((0.5, 0.3, 0.05), (0.5, 0.05, 0.01), ("Plain noise does learn", "100 steps and offset noise 50, 2.0 times")),
        ((0.5, 0.5, 0.4), (0.5, 0.05, 0.01), ("agrees with the article", "plain noise not at all")),
        ((0.5, 0.05, 0.01), (0.5, 0.3, 0.05), ("Plain noise does learn", "plain noise is faster")),
        ((0.5, 0.5, 0.4), (0.5, 0.5, 0.4), ("agrees with the article", "Offset noise did not learn it")),
    ],
)
def test_the_black_picture(tmp_path: pathlib.Path, data: Any, plain: Any, offset: Any, expected: Any) -> None:
    data({"all black": (0.0,)})
    runs = [
        _workdir(
            tmp_path / name, strength, {step: {"all black": [x]} for step, x in zip((0, 50, 100), run, strict=True)}
        )
        for name, strength, run in (("a", 0.0, plain), ("b", 0.1, offset))
    ]
    text = " ".join(_report(tmp_path, *runs)[0]["conclusions"])
    for sentence in expected:
        assert sentence in text
    data({SKI: (0.5,)})
    assert "black" not in " ".join(_report(tmp_path, *runs)[0]["conclusions"]), "these were not trained on it"
