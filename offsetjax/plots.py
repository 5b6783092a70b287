"""How all figures look: matplotlib at print quality, with colours that the colour-blind tell apart."""

import io
import textwrap
from typing import Any

import matplotlib
from matplotlib.figure import Figure

WIDTH = 8.0  # inches; 1,280 pixels
GREY, INK = "#8A8A8A", "#222222"
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31"),
    *("#332288", "#117733", "#882255", "#666666"),
)
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "figure.dpi": 160,
    "savefig.dpi": 160,
}
style = matplotlib.rc_context(_STYLE)


def colour(index: int) -> str:
    """The colour of the run or prompt at `index`, the same in every figure."""
    return _COLOURS[index % len(_COLOURS)]


def prompt_label(prompt: str, width: int = 60) -> str:
    """A prompt as text on a figure: `$` would begin mathematics."""
    short = textwrap.shorten(prompt, width, placeholder="…")
    short = short if short != "…" else f"{prompt[: width - 1]}…"  # one long word, as a run's name is
    return short.replace("$", r"\$") or "(no prompt)"


def png(figure: Figure) -> bytes:
    """A figure's PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
