"""What the figures say, in sentences, each chosen by the figures.

Every function takes the summary of `numbers.summarise` and yields plain text.
"""

from collections.abc import Iterator, Sequence

from offsetjax.config import is_indifferent
from offsetjax.report.numbers import Numbers, prompt_range
from offsetjax.report.section import Section

GREY_RANGE = 0.2  # brightest minus darkest prompt: up to this, the prompts come out alike
WIDE_RANGE = 0.5  # from this, a prompt decides on the brightness
BLACK = 0.1  # mean brightness below which a picture counts as black
RESTORED_SHARE = 2 / 3  # of the data's spread of brightness
WIDER = 1.5  # times: when nothing is known of the data, what counts as a wider spread


def conclusions(pooled: Numbers, runs: Sequence[Numbers], sections: Sequence[Section] = ()) -> list[str]:
    """All sentences that the figures support, most important first.

    Args:
        pooled: the summary of the pools, in which runs that differ in their seed alone are one.
        runs: the summary of each run by itself.
        sections: what the caller adds, between what compares the runs and what is wrong with one of them.
    """
    sentences = [text for run in pooled["runs"] for text in _range(run)]
    sentences += _controlled(pooled)
    sentences += [text for each in sections for text in each.conclusions(pooled["runs"])]
    sentences += [text for run in pooled["runs"] for text in _unconditional(run)]
    sentences += [text for run in runs for text in _health(run)]
    return sentences


def title(run: Numbers) -> str:
    """`ski (plain noise)` or `ski (offset_strength 0.1)`."""
    return f"{run['name']} ({run['noise']})"


def _range(run: Numbers) -> Iterator[str]:
    if not run["after"] or not (found := prompt_range(prompts := run["after"]["prompts"])):
        return
    darkest, brightest, width = found
    low, high = prompts[darkest]["mean"], prompts[brightest]["mean"]
    text = (
        f"{title(run)}: at step {run['after']['step']} the prompts' mean brightness goes from {low:.2f} "
        f"(“{darkest}”) to {high:.2f} (“{brightest}”), a range of {width:.2f}: {_verdict(low, high)}."
    )
    if len(run["samples"]) > 1 and (before := prompt_range(run["before"]["prompts"])):
        text += f" At step {run['before']['step']} the range was {before[2]:.2f}."
    known = run["data"].get("prompts", {})
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
    """Compares runs that were trained alike but for the strength of the offset."""
    runs, differences = numbers["runs"], numbers["config_differences"]
    for i, plain in enumerate(runs):
        for j, offset in enumerate(runs):
            if plain["noise"] != "plain noise" or offset["noise"] == "plain noise":
                continue
            fields = [field for field, values in differences.items() if values[i] != values[j]]
            others = [field for field in fields if not is_indifferent(field) and not field.startswith("noise.")]
            ranges = [
                found[2] for run in (plain, offset) if run["after"] and (found := prompt_range(run["after"]["prompts"]))
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


def _unconditional(run: Numbers) -> Iterator[str]:
    drawn = {start: each for start, each in run["unconditional"].items() if each["count"] > 1}
    data = run["data"].get("brightness", {}).get("std")
    if not drawn:
        return
    figures = ", ".join(
        f"{each['std']:.2f} from a {start} start" for start, each in sorted(drawn.items(), reverse=True)
    )
    text = f"{title(run)}: the brightness of pictures drawn for no prompt has a standard deviation of {figures}"
    text += f"; that of its training data is {data:.2f}" if data else "; that of its training data is not known"
    if run["noise"] == "plain noise":
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


def _health(run: Numbers) -> Iterator[str]:
    if not run["steps"]:
        yield f"{run['name']}: nothing has been logged yet."
    elif run["steps_configured"] and run["steps"] < run["steps_configured"]:
        yield f"{run['name']}: {run['steps']} of {run['steps_configured']} steps are done; its figures are not final."
    if run["steps_skipped"]:
        yield f"{run['name']}: {run['steps_skipped']} steps changed nothing, not being finite or being spikes."
    for name, found in run["not_finite"].items():
        yield f"{run['name']}: {name} was not finite {found['count']} times, first at step {found['first_step']}."
    settings = {
        tuple(each[key] for key in ("params", "start_noise", "guidance_scale", "num_steps")) for each in run["samples"]
    }
    if len(settings) > 1:
        yield (
            f"{run['name']}: its samples were not all drawn alike (weights, start noise, guidance or steps): compare "
            "with care."
        )
