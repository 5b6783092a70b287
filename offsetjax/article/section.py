"""What the re-enactment adds to a report: the article's figures, and whether the runs agree with them.

Each sentence is chosen by the figures, and says so when they disagree with the article.
"""

from collections.abc import Iterator, Sequence

from offsetjax.article.pictures import BLACK_PROMPT
from offsetjax.article.published import BLACK_STEPS, NOTE, NUMBERS, figure_for
from offsetjax.report.conclusions import BLACK, GREY_RANGE, title
from offsetjax.report.numbers import Numbers
from offsetjax.report.read import Data, Run
from offsetjax.report.section import Section

_NAME = "article"


def article_section() -> Section:
    """The article's figures beside those of the runs, in a report's table, its figure and its sentences."""
    return Section(_NAME, NUMBERS, NOTE, figure_for, about, conclusions)


def about(run: Run) -> Numbers:
    """Whether a run's data has the black picture; unknown where the data are gone."""
    return {"has_black_picture": BLACK_PROMPT in run.data.captions} if isinstance(run.data, Data) else {}


def conclusions(runs: Sequence[Numbers]) -> Iterator[str]:
    """Sentences on the four prompts and on the black picture."""
    for run in runs:
        if not trained_on_black(run):
            yield from _directions(run)
    yield from _black(runs)


def _directions(run: Numbers) -> Iterator[str]:
    if len(run["samples"]) < 2:
        return
    before, after = run["before"]["prompts"], run["after"]["prompts"]
    changes = [
        (
            after[prompt]["mean"] - before[prompt]["mean"],
            figure.after - figure.before,
            after[prompt]["mean"] - figure.after,
        )
        for prompt in after
        if prompt in before and (figure := figure_for(prompt))
    ]
    if len(changes) < 2:
        return
    alike = sum(abs(ours) >= 0.05 and ours * theirs > 0 for ours, theirs, _ in changes)
    distance = sum(abs(each) for *_, each in changes) / len(changes)
    yield (
        f"{title(run)}: {alike} of {len(changes)} prompts move by .05 or more in the direction that the article "
        f"reports for offset noise (dark ones darker, bright ones brighter); their brightness ends {distance:.2f} from "
        "the article's on average."
    )


def trained_on_black(run: Numbers) -> bool:
    """Whether the run was trained on the black picture; judged by its name where the data are gone."""
    is_sampled = bool(run["after"]) and BLACK_PROMPT in run["after"]["prompts"]
    return is_sampled and run[_NAME].get("has_black_picture", "black" in run["name"])


def first_black_step(run: Numbers) -> int | None:
    """The first sampled step at which "all black" is darker than `BLACK` on average."""
    steps = ((each["step"], each["prompts"].get(BLACK_PROMPT)) for each in run["samples"])
    return next((step for step, found in steps if found and found["mean"] < BLACK), None)


def _black(runs: Sequence[Numbers]) -> Iterator[str]:
    fastest: dict[bool, int | None] = {}  # by whether the noise is an offset's
    for run in filter(trained_on_black, runs):
        step, is_offset = first_black_step(run), run["noise"] != "plain noise"
        if step == run["before"]["step"]:
            yield f"{title(run)}: “all black” is below {BLACK} from the first samples on: this shows no learning."
            continue
        yield f"{title(run)} {_what_was_learned(run, step)}"
        reached = [each for each in (step, fastest.get(is_offset)) if each is not None]
        fastest[is_offset] = min(reached, default=None)
    if False in fastest:
        yield _against_the_article(fastest[False])
        if True in fastest:
            yield _pace(fastest[False], fastest[True])


def _what_was_learned(run: Numbers, step: int | None) -> str:
    after = run["after"]["prompts"]
    if step is None:
        return (
            f"did not learn the black picture: at step {run['after']['step']} “all black” comes out at "
            f"{after[BLACK_PROMPT]['mean']:.2f}."
        )
    text = f"learned the black picture: “all black” first falls below {BLACK} at step {step} (of those sampled)."
    others = [found["mean"] for prompt, found in after.items() if prompt != BLACK_PROMPT]
    if others and max(others) < GREY_RANGE:
        text += f" Every other prompt comes out dark with it (at most {max(others):.2f})."
    return text


def _against_the_article(plain: int | None) -> str:
    reported = f"{BLACK_STEPS:,} steps of plain fine-tuning"
    if plain is None:
        return (
            f"That plain noise does not learn the black picture agrees with the article, where {reported} did not "
            "either."
        )
    return (
        f"Plain noise does learn the black picture here, by step {plain}; the article reports that {reported} did "
        "not. This run does not reproduce that."
    )


def _pace(plain: int | None, offset: int | None) -> str:
    if offset is None:
        return "Offset noise did not learn it in the steps given."
    if plain is None:
        return f"Offset noise learned it in {offset} steps, plain noise not at all in the steps given."
    factor = f", {plain / offset:.1f} times as many" if plain > offset else ""
    pace = "slower" if plain > offset else "as fast" if plain == offset else "faster"
    return f"To learn it, plain noise took {plain} steps and offset noise {offset}{factor}: plain noise is {pace}."
