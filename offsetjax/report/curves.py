"""Figures over the steps of training: a line a pool of runs, with a band from the lowest run to the highest."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offsetjax.plots import WIDTH, colour, prompt_label, style
from offsetjax.report.pool import Curve, Pool

_LABEL = 58  # letters of a name
_PANELS = 3  # pools that are shown side by side
_LOSS_OF = r"loss_\d{1,5}x\d{1,5}"


def _legend_columns(pools: Sequence[Pool]) -> int:
    return 3 if max(len(pool.name) for pool in pools) <= 34 else 2


def _finish(canvas: Figure, panels: Iterable[Axes], labelled: Axes, pools: Sequence[Pool]) -> Figure:
    for axes in panels:
        axes.set_xlabel(axes.get_xlabel() or "step")
        axes.grid(color="#EEEEEE", which="both")
    handles, labels = labelled.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower left", ncols=_legend_columns(pools), fontsize=7.5)
    return canvas


def _canvas(pools: Sequence[Pool], columns: int) -> tuple[Figure, list[Axes]]:
    legend = 0.18 * -(-len(pools) // _legend_columns(pools))
    canvas = Figure(figsize=(WIDTH, 2.7 + legend), layout="constrained")
    return canvas, list(canvas.subplots(1, columns, squeeze=False)[0])


def _draw(axes: Axes, curve: Curve, index: int, label: str | None = None, line: str = "o-") -> None:
    axes.plot(curve.steps, curve.mean, line, ms=3, lw=1.4, color=colour(index), label=label)
    if (curve.high > curve.low).any():
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour(index), alpha=0.15, lw=0)


def _smooth(curve: Curve) -> Curve:
    """A running mean over a fifteenth of the steps."""
    window = np.ones(max(1, len(curve.steps) // 15))
    weight = np.convolve(np.ones(len(curve.steps)), window, "same")
    low, mean, high = (np.convolve(each, window, "same") / weight for each in (curve.low, curve.mean, curve.high))
    return Curve(curve.steps, mean, low, high)


@style
def losses(pools: Sequence[Pool]) -> Figure | None:
    """The logged losses (faint, of a run alone) and their running mean; and the learning rate.

    Of pictures of several sizes a logged step has one: the mean since the last line is drawn. The seams of stages are
    dotted.
    """
    curves = [pool.curve("loss_of_sizes") or pool.curve("loss") for pool in pools]
    found = [(index, pool, curve) for index, (pool, curve) in enumerate(zip(pools, curves, strict=True)) if curve]
    if not any(len(curve.steps) > 1 for *_, curve in found):
        return None
    canvas, (loss, rate) = _canvas(pools, 2)
    for index, pool, curve in found:
        if len(pool.runs) == 1:
            loss.plot(curve.steps, curve.mean, color=colour(index), lw=0.6, alpha=0.35)
        _draw(loss, _smooth(curve), index, prompt_label(pool.name, _LABEL), "-")
        if learning_rate := pool.curve("learning_rate"):
            # Dashes that differ: schedules that are the same would hide one another.
            rate.plot(
                learning_rate.steps, learning_rate.mean, color=colour(index), lw=1.4, ls=(3 * index, (4, index % 4))
            )
    if all((curve.mean > 0).all() for *_, curve in found):
        loss.set_yscale("log")
    for seam in {stage.steps.stop for pool in pools for run in pool.runs for stage in run.stages[:-1]}:
        for axes in (loss, rate):
            axes.axvline(seam + 0.5, color="#999999", lw=0.8, ls=":")
    loss.set(title="Loss")
    rate.set(title="Learning rate", ylim=(0, None))
    return _finish(canvas, (loss, rate), loss, pools)


@style
def losses_of_sizes(pools: Sequence[Pool]) -> Figure | None:
    """The running mean of the loss of each size of pictures; a panel a pool, of the first that have several."""
    found = [(pool, sizes) for pool in pools if len(sizes := _sizes(pool)) > 1][:_PANELS]
    if not found:
        return None
    canvas = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    panels = canvas.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (pool, sizes) in zip(panels, found, strict=True):
        for place, (size, curve) in enumerate(sizes.items()):
            _draw(axes, _smooth(curve), place, size.replace("x", " x "), "-")
        axes.set(title=prompt_label(pool.name, _LABEL // len(found)), xlabel="step")
        axes.grid(color="#EEEEEE", which="both")
        axes.legend(fontsize=7.5, ncols=2)
    panels[0].set_ylabel("loss")
    return canvas


def _sizes(pool: Pool) -> dict[str, Curve]:
    """The loss of each size that a pool has logged more than once, from the narrowest to the widest."""
    fields = {field for run in pool.runs for line in run.metrics for field in line if re.fullmatch(_LOSS_OF, field)}
    sides = {field: [int(side) for side in field.removeprefix("loss_").split("x")] for field in fields}
    ordered = sorted(fields, key=lambda field: (sides[field][0] / max(1, sides[field][1]), sides[field]))
    curves = {field.removeprefix("loss_"): pool.curve(field) for field in ordered}
    return {size: curve for size, curve in curves.items() if curve and len(curve.steps) > 1}


@style
def validation(pools: Sequence[Pool]) -> Figure | None:
    """The validation loss for plain noise, which compares; and by timestep at the end."""
    if not any(pool.curve("validation_plain") for pool in pools):
        return None
    canvas, (over_steps, by_time) = _canvas(pools, 2)
    for index, pool in enumerate(pools):
        if not (plain := pool.curve("validation_plain")):
            continue
        _draw(over_steps, plain, index, prompt_label(pool.name, _LABEL))
        if own := pool.curve("validation_training"):
            over_steps.plot(own.steps, own.mean, "--", lw=1, color=colour(index))
        if by_timestep := _by_timestep(pool):
            _draw(by_time, by_timestep, index)
    over_steps.set(yscale="log", title="Validation loss: plain noise ●, own noise - -")
    by_time.set(xlabel="timestep of the noise", yscale="log", title="Plain noise, after the last step")
    return _finish(canvas, (over_steps, by_time), over_steps, pools)


def _by_timestep(pool: Pool) -> Curve | None:
    """The last validation losses, with the timesteps of the noise as `steps`."""
    prefix = "validation_plain_t"
    times = {
        int(field[len(prefix) :]) for run in pool.runs for line in run.evaluations for field in line if prefix in field
    }
    last = [(time, curve) for time in sorted(times) if (curve := pool.curve(f"{prefix}{time}"))]
    if not last:
        return None
    mean, low, high = (np.array([getattr(curve, name)[-1] for _, curve in last]) for name in ("mean", "low", "high"))
    return Curve(np.array([time for time, _ in last]), mean, low, high)


@style
def probe(pools: Sequence[Pool]) -> Figure | None:
    """What a probe's pictures are like over the steps: brightness, its extremes, and its distance to the data's."""
    if not any(pool.curve("brightness_mean") for pool in pools):
        return None
    canvas, panels = _canvas(pools, 4)
    fields = ("brightness_mean", "brightness_std", "brightness_near_black", "brightness_wasserstein")
    for index, pool in enumerate(pools):
        for axes, field in zip(panels, fields, strict=True):
            if curve := pool.curve(field):
                _draw(axes, curve, index, prompt_label(pool.name, _LABEL))
        if white := pool.curve("brightness_near_white"):
            panels[2].plot(white.steps, white.mean, "o--", ms=3, mfc="white", color=colour(index))
    for axes, title in zip(panels, ("Mean", "Spread", "Near black ●, white ○", "W1 to the data"), strict=True):
        axes.set_title(title)
    panels[0].set_ylim(0, 1)
    panels[2].set_ylim(-0.02, None)
    for axes in (panels[1], panels[3]):
        axes.set_ylim(0, None)
    return _finish(canvas, panels, panels[0], pools)
