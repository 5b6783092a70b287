"""What a caller adds to a report: published figures beside the runs' own, sentences, and numbers of its own."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from offsetjax.report.read import Run


@dataclass(frozen=True)
class Reference:
    """Mean brightness that somebody else reported for a prompt, before and after training; `source` in a few words."""

    source: str
    before: float
    after: float


def _no_reference(prompt: str) -> Reference | None:
    return None


def _nothing_about(run: Run) -> dict[str, Any]:
    return {}


def _no_conclusions(runs: Sequence[dict[str, Any]]) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Section:
    """An addition to a report, of which all but the name may be left out.

    Attributes:
        name: the key of its numbers in report.json, at the top and in each run.
        numbers: for the top of report.json, in JSON's types.
        note: plain text under the figure of brightness, where a prompt has a reference.
        reference: the published figure for a prompt, if it has one.
        about: what `conclusions` has to know of a run beyond its summary, in JSON's types.
        conclusions: sentences about the summaries of the runs (`numbers.summarise`), in which those that differ in
            their seed alone are one.
    """

    name: str
    numbers: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    reference: Callable[[str], Reference | None] = _no_reference
    about: Callable[[Run], dict[str, Any]] = _nothing_about
    conclusions: Callable[[Sequence[dict[str, Any]]], Iterable[str]] = _no_conclusions


def find_references(sections: Iterable[Section], prompts: Iterable[str]) -> dict[str, list[Reference]]:
    """The published figures for each prompt that has any."""
    sections = list(sections)
    found = {prompt: [each for section in sections if (each := section.reference(prompt))] for prompt in prompts}
    return {prompt: references for prompt, references in found.items() if references}


def find_notes(sections: Iterable[Section], prompts: Iterable[str]) -> str:
    """The notes of the sections that have a figure for one of the prompts."""
    prompts = list(prompts)
    return "".join(f" {section.note}" for section in sections if any(map(section.reference, prompts)))
