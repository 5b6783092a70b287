"""The page: self-contained HTML without scripts, its pictures inlined."""

import base64
from collections.abc import Mapping, Sequence
from datetime import timedelta
from html import escape
from typing import Any

from offsetjax.report.figures import all_prompts
from offsetjax.report.numbers import Numbers

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 Georgia, 'DejaVu Serif', serif; color: #222; background: #fff; margin: 0 auto; padding: 1.2rem;
  max-width: 60rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .6rem 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; display: block; }
figcaption, .note { color: #555; font-size: .88rem; margin-top: .4rem; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; } .pair figure { flex: 1 1 18rem; margin: 0; max-width: 36rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font: .85rem/1.4 'DejaVu Sans', sans-serif; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.text { text-align: left; white-space: normal; min-width: 8rem; overflow-wrap: anywhere; }
td.text:first-child { white-space: nowrap; } li { margin: .35rem 0; overflow-wrap: anywhere; }
@media print { h2, figure, tr { break-inside: avoid; } }
"""

Pictures = Mapping[str, bytes]
_NONE = "\N{EN DASH}"


def render(numbers: Numbers, pictures: Pictures, note: str = "") -> str:
    """The page's HTML.

    Args:
        numbers: the summary of `numbers.summarise`, with `conclusions`, plain text, and `pools`, summaries of the runs
            that differ in their seed alone, taken together.
        pictures: PNG bytes by name: headline, swept, brightness, curves, losses, unconditional, and `before_0`,
            `after_0` … for the grids of each pool, seconds; those that are absent are left out.
        note: text that the caller's sections add under the figure of brightness.
    """
    runs, pools = numbers["runs"], numbers["pools"]
    names = ", ".join(escape(pool["name"]) for pool in pools)
    conclusions = "".join(f"<li>{escape(sentence)}</li>" for sentence in numbers["conclusions"])
    is_pooled = len(pools) < len(runs)
    band = _BAND_NOTE if is_pooled else ""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Brightness before and after training: {names}</title><style>{_CSS}</style></head><body>",
        f"<h1>{'Brightness before and after training' if pictures.get('brightness') else 'Training report'}</h1>",
        f"<p class='note'>{names}</p>",
        _figure(pictures, "headline", _HEADLINE_NOTE + (_FIRST_NOTE if is_pooled else "")),
        f"<h2>What the runs say</h2><ul>{conclusions}</ul>" if conclusions else "",
        _section(pictures, "swept", "Brightness against what was varied", _SWEPT_NOTE),
        _section(pictures, "brightness", "Brightness by prompt", _BRIGHTNESS_NOTE + note),
        _brightness_table(pools),
        _section(
            pictures, "curves", "Brightness over the steps", "A panel a run; bands: ± standard deviation over seeds."
        ),
        _section(pictures, "unconditional", "Spread of brightness without a prompt", _SPREAD_NOTE),
        _section(pictures, "probe", "Brightness of a probe", _PROBE_NOTE + band),
        _grids(pools, pictures),
        "<h2>Runs</h2>" + _runs_table(runs),
        _stages_table(runs),
        _seconds(runs, pictures),
        _section(pictures, "losses", "Loss", _LOSS_NOTE + band),
        _section(pictures, "sizes", "Loss by the size of pictures", _SIZES_NOTE + band),
        _section(pictures, "validation", "Validation loss", _VALIDATION_NOTE + band),
        _differences(numbers),
        _data_notes(pools),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


_HEADLINE_NOTE = "The same seeds in every column; below each row its mean brightness over all seeds."
_FIRST_NOTE = " Of runs that differ in their seed alone, the first is shown."
_BAND_NOTE = (
    " Runs that differ in their seed alone are one line, their mean; the band goes from the lowest to the highest."
)
_SWEPT_NOTE = (
    "A dot a run, a line through the means of the runs, dashes for the training pictures of the same caption. Each "
    "panel's runs differ in the field below it alone, and in their seeds."
)
_BRIGHTNESS_NOTE = "Mean over all RGB values of a picture."
_LOSS_NOTE = "The running mean of the logged losses. Losses of unlike noise do not compare."
_SIZES_NOTE = "The running mean of the means between two lines of the log. Sizes differ by what their pictures show."
_SPREAD_NOTE = (
    "How much the brightness of pictures drawn for the empty prompt varies, by the noise that sampling starts from: "
    "plain, or matched to the training's."
)
_PROBE_NOTE = (
    "Fixed prompts and seeds; near black is a brightness below .1, near white one above .9; W1 is the Wasserstein "
    "distance to the distribution of the training pictures."
)
_SECONDS_NOTE = (
    "Every second from the first start on. Data: waiting for it. Idle: between two starts. Lost: after the checkpoint "
    "from which the next start resumed."
)
_VALIDATION_NOTE = (
    "Fixed pictures, timesteps and noise. Solid: plain noise, which compares between runs; dashed: the noise of each "
    "run's own training."
)


def _image(png: bytes, alternative: str) -> str:
    return f"<img alt='{escape(alternative)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _figure(pictures: Pictures, name: str, caption: str) -> str:
    if name not in pictures:
        return ""
    return f"<figure>{_image(pictures[name], caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _section(pictures: Pictures, name: str, title: str, caption: str) -> str:
    return f"<h2>{title}</h2>{_figure(pictures, name, caption)}" if name in pictures else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], text: bool = False) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    kind = " class='text'" if text else ""
    body = "".join("<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><tr>{cells}</tr>{body}</table></div>"


def _mean_std(found: Mapping[str, Any] | None) -> str:
    return f"{found['mean']:.3f} ± {found['std']:.3f}" if found else _NONE


def _brightness_table(runs: Sequence[Numbers]) -> str:
    rows = [
        [
            prompt or "(no prompt)",
            run["name"],
            _mean_std(run["before"]["prompts"].get(prompt) if len(run["samples"]) > 1 else None),
            _mean_std(run["after"]["prompts"][prompt]),
            str(run["after"]["prompts"][prompt]["count"]),
            _mean_std(run["data"].get("prompts", {}).get(prompt)),
        ]
        for prompt in all_prompts(runs)
        for run in runs
        if run["after"] and prompt in run["after"]["prompts"]
    ]
    return _table(["prompt", "run", "before", "after", "seeds", "data"], rows) if rows else ""


def _grids(runs: Sequence[Numbers], pictures: Pictures) -> str:
    parts = []
    for index, run in enumerate(runs):
        figures = "".join(
            _figure(pictures, f"{when}_{index}", _drawn(run[when])) for when in ("before", "after") if run[when]
        )
        if figures:
            parts.append(f"<h3>{escape(run['name'])}</h3><div class='pair'>{figures}</div>")
    return "<h2>Samples</h2>" + "".join(parts) if parts else ""


def _drawn(samples: Numbers) -> str:
    return (
        f"Step {samples['step']}: a row a prompt, a column a seed; {samples['params']} weights, {samples['num_steps']} "
        f"steps, guidance {samples['guidance_scale']:g}, {samples['start_noise']} start noise."
    )


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _runs_table(runs: Sequence[Numbers]) -> str:
    head = ["run", "noise", "steps", "time", "images/s", "first loss", "last loss", "skipped"]
    rows = [
        [
            run["name"],
            run["noise"],
            str(run["steps"]),
            _NONE if run["wall_clock_seconds"] is None else str(timedelta(seconds=round(run["wall_clock_seconds"]))),
            _number(run["images_per_second"], ".1f"),
            _number(run["first_loss"], ".4f"),
            _number(run["last_loss"], ".4f"),
            str(run["steps_skipped"]),
        ]
        for run in runs
    ]
    note = "Time: wall-clock, sampling and checkpoints included. Last loss: the mean of the last tenth logged."
    return _table(head, rows) + f"<p class='note'>{note}</p>"


def _stages_table(runs: Sequence[Numbers]) -> str:
    """A row for each stage of the runs that have several."""
    rows = [
        [
            run["name"],
            f"{stage['stage']}",
            f"{stage['first_step']:,} to {stage['last_step']:,}",
            ", ".join(f"{path} {_value(value)}" for path, value in stage["settings"].items()),
            _number(stage["last_loss"], ".4f"),
        ]
        for run in runs
        for stage in run["stages"]
    ]
    return "<h2>Stages</h2>" + _table(["run", "stage", "steps", "settings", "last loss"], rows) if rows else ""


def _seconds(runs: Sequence[Numbers], pictures: Pictures) -> str:
    """A bar and a row a run: what share of its wall clock went into what."""
    runs = [run for run in runs if run["seconds"]]
    if not runs:
        return ""
    kinds = list(runs[0]["seconds"])
    rows = []
    for run in runs:
        total = sum(run["seconds"].values())
        shares = (f"{run['seconds'][kind] / total:.1%}" if total else _NONE for kind in kinds)
        rows.append([run["name"], str(timedelta(seconds=round(total))), *shares])
    table = _table(["run", "wall clock", *kinds], rows) + f"<p class='note'>{_SECONDS_NOTE}</p>"
    return _figure(pictures, "seconds", "What the wall clock was spent on; in white, the share of steps.") + table


def _differences(numbers: Numbers) -> str:
    """A row a field, a column a pool: of a field on which its runs differ, such as the seed, all values."""
    pools = numbers["pools"]
    if len(numbers["runs"]) < 2:
        return ""
    places = {run["name"]: place for place, run in enumerate(numbers["runs"])}
    rows = []
    for field, values in numbers["config_differences"].items():
        each = ([values[places[run]] for run in pool["runs"]] for pool in pools)
        rows.append([field, *(", ".join(dict.fromkeys(map(_value, found))) for found in each)])
    head = ["field", *(pool["name"] for pool in pools)]
    body = _table(head, rows, text=True) if rows else "<p>None: the runs have the same configuration.</p>"
    return "<h2>Differences in configuration</h2>" + body


def _value(value: Any) -> str:
    text = _NONE if value is None else str(value)
    return text if len(text) <= 160 else text[:159] + "…"


def _data_notes(runs: Sequence[Numbers]) -> str:
    notes = []
    for run in runs:
        data = run["data"]
        if "unavailable" in data:
            notes.append(f"{run['name']}: {data['unavailable']}; its brightness is not shown.")
            continue
        sampled = (
            f", measured on {data['pictures_measured']:,} of them"
            if data["pictures_measured"] < data["pictures"]
            else ""
        )
        notes.append(
            f"{run['name']}: {data['pictures']:,} pictures{sampled}, brightness {_mean_std(data['brightness'])}."
        )
    return "<h2>Data</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"
