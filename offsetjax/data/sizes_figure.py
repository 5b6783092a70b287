"""A figure of the sizes that suit a data set: their shapes, how many pictures each has, and what is cropped."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from offsetjax.data.buckets import Assignment
from offsetjax.plots import GREY, INK, WIDTH, colour, style

_ASPECTS = ((1, 3), (1, 2), (2, 3), (1, 1), (3, 2), (2, 1), (3, 1))


@style
def sizes_figure(
    sizes: Int[np.ndarray, "n 2"], found: Assignment, counts: Sequence[int], lost: Sequence[float]
) -> Figure:
    """Above, each size to scale; below, the pictures' aspects by their size, and what other numbers of sizes crop.

    Args:
        sizes: width and height of each picture.
        found: the size of each.
        counts, lost: numbers of sizes, and the share of all pixels that so many crop.
    """
    canvas = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    shapes, below = canvas.subfigures(2, 1, height_ratios=(1.1, 1), squeeze=False)[:, 0]
    axes, losses = below.subplots(1, 2, width_ratios=(1.6, 1))
    _draw_shapes(shapes.subplots(), found)
    _draw_aspects(axes, sizes, found)
    losses.plot(counts, lost, "o-", ms=4, lw=1.4, color=GREY)
    losses.plot(len(found.sizes), found.losses @ found.counts / max(1, found.counts.sum()), "o", ms=7, color=INK)
    losses.set(title="Cropped, by the number of sizes", xlabel="sizes (1: squares)", ylim=(0, None))
    losses.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    losses.xaxis.set_major_locator(FixedLocator(list(counts)))
    return canvas


def _draw_shapes(axes: Axes, found: Assignment) -> None:
    """Each size to scale, the same distance apart, with its name and numbers under it."""
    counts, lost, most = found.counts, found.losses, max(max(size) for size in found.sizes)
    for place, (size, count, loss) in enumerate(zip(found.sizes, counts, lost, strict=True)):
        wide, high = 0.86 * size.width / most, 0.86 * size.height / most
        axes.add_patch(Rectangle((place - wide / 2, 0.5 - high / 2), wide, high, color=colour(place), alpha=0.85, lw=0))
        share = count / max(1, counts.sum())
        axes.text(place, 0.5, f"{share:.0%}", ha="center", va="center", color="white", fontsize=10, weight="bold")
        text = f"{size.width} x {size.height}\n{count:,} pictures\n{loss:.1%} cropped"
        axes.text(place, 0.0, text, ha="center", va="top", fontsize=7.5, linespacing=1.4)
    left_out = int((found.bucket < 0).sum())
    of_all = f"; {left_out:,} of {len(found.bucket):,} pictures are left out" * (left_out > 0)
    axes.set(title=f"Sizes, and the share of the pictures that has each{of_all}")
    axes.set(xlim=(-0.5, max(4, len(found.sizes)) - 0.5), ylim=(-0.42, 1.0), aspect="equal")
    axes.axis("off")


def _draw_aspects(axes: Axes, sizes: Int[np.ndarray, "n 2"], found: Assignment) -> None:
    """How many pictures have which shape, in the colours of their sizes; what is left out is grey."""
    aspects = np.log2(sizes[:, 0] / np.maximum(1, sizes[:, 1]))
    edge = min(3.0, max(1.0, float(np.abs(aspects).max(initial=0.0)) + 0.1))
    groups = [aspects[found.bucket == place] for place in (-1, *range(len(found.sizes)))]
    colours = [GREY, *(colour(place) for place in range(len(found.sizes)))]
    axes.hist(
        [np.clip(each, -edge, edge) for each in groups],
        np.linspace(-edge, edge, 61).tolist(),
        stacked=True,
        color=colours,
    )
    for place, size in enumerate(found.sizes):
        axes.axvline(np.log2(size.aspect), color=colour(place), lw=0.8, ls=":")
    axes.set(title="Pictures by their shape", xlabel="width : height", ylabel="pictures", xlim=(-edge, edge))
    named = [(wide, high) for wide, high in _ASPECTS if abs(np.log2(wide / high)) <= edge]
    axes.xaxis.set_major_locator(FixedLocator([float(np.log2(wide / high)) for wide, high in named]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda _, place: "{}:{}".format(*named[place or 0])))
