"""What the figures say, in sentences: each is chosen by the figures, and says so when they disagree with the article.

Every function takes the summary of `numbers.summarise` and yields plain text.
"""

from collections.abc import Iterator, Sequence

from offsetjax.config import is_indifferent
from offsetjax.report import article
from offsetjax.report.numbers import Numbers, prompt_range

GREY_RANGE = 0.2  # brightest minus darkest prompt: up to this, the prompts come out alike
WIDE_RANGE = 0.5  # from this, a prompt decides on the brightness
BLACK = 0.1  # mean brightness below which "all black" counts as black
RESTORED_SHARE = 2 / 3  # of the data's spread of brightness
WIDER = 1.5  # times: when nothing is known of the data, what counts as a wider spread


def conclusions(numbers: Numbers, runs: Sequence[Numbers]) -> list[str]:
    """All sentences that the figures support, most important first.

    Args:
        numbers: of the pools, in which runs that differ in their seed alone are one arm.
        runs: the arms, each run by itself.
    """
    # A black picture says nothing of how far a prompt can move the brightness.
    scenes = [arm for arm in numbers["arms"] if not trained_on_black(arm)]
    sentences = [text for arm in scenes for text in _range(arm)]
    sentences += _controlled(numbers)
    sentences += [text for arm in scenes for text in _article(arm)]
    sentences += _black(numbers["arms"])
    sentences += [text for arm in numbers["arms"] for text in _unconditional(arm)]
    sentences += [text for arm in runs for text in _health(arm)]
    return sentences


def title(arm: Numbers) -> str:
    """`ski (plain noise)` or `ski (offset_strength 0.1)`."""
    return f"{arm['name']} ({arm['noise']})"


def _range(arm: Numbers) -> Iterator[str]:
    if not arm["after"] or not (found := prompt_range(prompts := arm["after"]["prompts"])):
        return
    darkest, brightest, width = found
    low, high = prompts[darkest]["mean"], prompts[brightest]["mean"]
    text = (
        f"{title(arm)}: at step {arm['after']['step']} the prompts' mean brightness goes from {low:.2f} "
        f"(“{darkest}”) to {high:.2f} (“{brightest}”), a range of {width:.2f}: {_verdict(low, high)}."
    )
    if len(arm["samples"]) > 1 and (before := prompt_range(arm["before"]["prompts"])):
        text += f" At step {arm['before']['step']} the range was {before[2]:.2f}."
    known = arm["data"].get("prompts", {})
    if found := prompt_range({prompt: known[prompt] for prompt in prompts if prompt in known}):
        text += f" In its training data it is {found[2]:.2f}."
    yield text


def _verdict(low: float, high: float) -> str:
    if high - low <= GREY_RANGE:
        if high < 1 / 3:
            return "every prompt comes out dark"
        return "every prompt comes out bright" if low > 2 / 3 else "the samples are grey, whatever the prompt"
    if high - low < WIDE_RANGE:
        return "the prompts differ, but do not reach from dark to bright"
    return "from black to white" if low < BLACK and high > 1 - BLACK else "from dark to bright"


def _controlled(numbers: Numbers) -> Iterator[str]:
    """Compares arms that were trained alike but for the strength of the offset."""
    arms, differences = numbers["arms"], numbers["config_differences"]
    for i, plain in enumerate(arms):
        for j, offset in enumerate(arms):
            if plain["noise"] != "plain noise" or offset["noise"] == "plain noise" or trained_on_black(plain):
                continue
            fields = [field for field, values in differences.items() if values[i] != values[j]]
            others = [field for field in fields if not is_indifferent(field) and not field.startswith("noise.")]
            ranges = [
                found[2] for arm in (plain, offset) if arm["after"] and (found := prompt_range(arm["after"]["prompts"]))
            ]
            same_step = plain["after"] and offset["after"] and plain["after"]["step"] == offset["after"]["step"]
            if others or not same_step or len(ranges) < 2:
                continue
            gain = ranges[1] - ranges[0]
            if gain > GREY_RANGE:
                verdict = "so it is the noise that widened the range"
            else:
                verdict = "so the noise did not widen the range" if gain < 0.05 else "so the noise widened it a little"
            yield (
                f"{plain['name']} and {offset['name']} differ in their noise alone ({plain['noise']} and "
                f"{offset['noise']}): their ranges are {ranges[0]:.2f} and {ranges[1]:.2f}, {verdict}."
            )


def _article(arm: Numbers) -> Iterator[str]:
    if len(arm["samples"]) < 2:
        return
    before, after = arm["before"]["prompts"], arm["after"]["prompts"]
    pairs = [(prompt, article.figure_for(prompt)) for prompt in after if prompt in before]
    changes = [
        (
            after[prompt]["mean"] - before[prompt]["mean"],
            figure.after - figure.before,
            after[prompt]["mean"] - figure.after,
        )
        for prompt, figure in pairs
        if figure
    ]
    if len(changes) < 2:
        return
    alike = sum(abs(ours) >= 0.05 and ours * theirs > 0 for ours, theirs, _ in changes)
    distance = sum(abs(each) for *_, each in changes) / len(changes)
    yield (
        f"{title(arm)}: {alike} of {len(changes)} prompts move by .05 or more in the direction that the article "
        f"reports for offset noise (dark ones darker, bright ones brighter); their brightness ends {distance:.2f} from "
        "the article's on average."
    )


def trained_on_black(arm: Numbers) -> bool:
    """Whether the arm was trained on the black picture; judged by its name where the data are gone."""
    return (
        bool(arm["after"])
        and article.BLACK_PROMPT in arm["after"]["prompts"]
        and arm["data"].get("has_black_picture", "black" in arm["name"])
    )


def first_black_step(arm: Numbers) -> int | None:
    """The first sampled step at which "all black" is darker than `BLACK` on average."""
    steps = ((each["step"], each["prompts"].get(article.BLACK_PROMPT)) for each in arm["samples"])
    return next((step for step, found in steps if found and found["mean"] < BLACK), None)


def _black(arms: list[Numbers]) -> Iterator[str]:
    fastest: dict[bool, int | None] = {}
    for arm in filter(trained_on_black, arms):
        step, is_offset = first_black_step(arm), arm["noise"] != "plain noise"
        end = arm["after"]["prompts"][article.BLACK_PROMPT]["mean"]
        if step == arm["before"]["step"]:
            yield f"{title(arm)}: “all black” is below {BLACK} from the first samples on: this shows no learning."
            continue
        if step is None:
            text = (
                f"did not learn the black picture: at step {arm['after']['step']} “all black” comes out at {end:.2f}."
            )
        else:
            text = (
                f"learned the black picture: “all black” first falls below {BLACK} at step {step} (of those sampled)."
            )
        others = [found["mean"] for prompt, found in arm["after"]["prompts"].items() if prompt != article.BLACK_PROMPT]
        if step is not None and others and max(others) < GREY_RANGE:
            text += f" Every other prompt comes out dark with it (at most {max(others):.2f})."
        yield f"{title(arm)} {text}"
        reached = [each for each in (step, fastest.get(is_offset)) if each is not None]
        fastest[is_offset] = min(reached, default=None)
    if False not in fastest:
        return
    plain, offset, reported = fastest[False], fastest.get(True), f"{article.BLACK_STEPS:,} steps of plain fine-tuning"
    if plain is None:
        yield (
            f"That plain noise does not learn the black picture agrees with the article, where {reported} did not "
            "either."
        )
    else:
        yield (
            f"Plain noise does learn the black picture here, by step {plain}; the article reports that {reported} did "
            "not. This run does not reproduce that."
        )
    if True not in fastest:
        return
    if plain is not None and offset is not None:
        factor = f", {plain / offset:.1f} times as many" if plain > offset else ""
        pace = "slower" if plain > offset else "as fast" if plain == offset else "faster"
        yield f"To learn it, plain noise took {plain} steps and offset noise {offset}{factor}: plain noise is {pace}."
    elif offset is not None:
        yield f"Offset noise learned it in {offset} steps, plain noise not at all in the steps given."
    else:
        yield "Offset noise did not learn it in the steps given."


def _unconditional(arm: Numbers) -> Iterator[str]:
    drawn = {start: each for start, each in arm["unconditional"].items() if each["count"] > 1}
    data = arm["data"].get("brightness", {}).get("std")
    if not drawn:
        return
    figures = ", ".join(
        f"{each['std']:.2f} from a {start} start" for start, each in sorted(drawn.items(), reverse=True)
    )
    text = f"{title(arm)}: the brightness of pictures drawn for no prompt has a standard deviation of {figures}"
    text += f"; that of its training data is {data:.2f}" if data else "; that of its training data is not known"
    if arm["noise"] == "plain noise":
        if data:
            share = max(each["std"] for each in drawn.values()) / data
            lost = share < RESTORED_SHARE
            text += f". Plain training {'loses most of' if share < 0.5 else 'narrows' if lost else 'keeps'} the spread"
    elif {"plain", "matched"} <= drawn.keys():
        text += ". " + _what_restores(drawn["plain"]["std"], drawn["matched"]["std"], data)
    yield text + "."


def _what_restores(plain: float, matched: float, data: float | None) -> str:
    if not data:
        wider = matched >= WIDER * plain
        return (
            "The matched start noise widens the spread"
            if wider
            else "The matched start noise does not widen the spread"
        )
    restored = plain >= RESTORED_SHARE * data, matched >= RESTORED_SHARE * data
    if restored == (False, True):
        return "It is the matched start noise that restores the spread, not the training with offset noise alone"
    if restored == (True, True):
        return "Training with offset noise restores the spread even from a plain start; the matched start is not needed"
    if restored == (True, False):
        return "The plain start restores the spread and the matched one does not, contrary to the theory"
    trend = (
        "though the matched start widens it" if matched >= WIDER * plain else "and the start noise makes no difference"
    )
    return f"Neither start restores the spread, {trend}"


def _health(arm: Numbers) -> Iterator[str]:
    if not arm["steps"]:
        yield f"{arm['name']}: nothing has been logged yet."
    elif arm["steps_configured"] and arm["steps"] < arm["steps_configured"]:
        yield f"{arm['name']}: {arm['steps']} of {arm['steps_configured']} steps are done; its figures are not final."
    if arm["steps_skipped"]:
        yield f"{arm['name']}: {arm['steps_skipped']} steps were skipped, their loss or gradient not being finite."
    settings = {
        tuple(each[key] for key in ("params", "start_noise", "guidance_scale", "num_steps")) for each in arm["samples"]
    }
    if len(settings) > 1:
        yield (
            f"{arm['name']}: its samples were not all drawn alike (weights, start noise, guidance or steps): compare "
            "with care."
        )
