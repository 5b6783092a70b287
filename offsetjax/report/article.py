"""The figures that N. Guttenberg's "Diffusion with Offset Noise" reports (CrossLabs, 2023).

Mean brightness of the pictures for four prompts, 0 black and 1 white, by Stable Diffusion before and after about
1,000 steps of fine-tuning on 40 pictures with `offset_strength` 0.1.
"""

from dataclasses import dataclass

SOURCE = 'N. Guttenberg, "Diffusion with Offset Noise", CrossLabs 2023'
OFFSET_STRENGTH = 0.1
STEPS = 1000
BLACK_PROMPT = "all black"
BLACK_STEPS = 3000  # of plain fine-tuning on one black picture, after which "all black" was still not black


@dataclass(frozen=True)
class ArticleFigure:
    """Mean brightness `before` and `after` for the prompts that contain `key`."""

    key: str
    before: float
    after: float


FIGURES = (
    ArticleFigure("town square", 0.452, 0.031),
    ArticleFigure("dark alley", 0.301, 0.032),
    ArticleFigure("ski slope", 0.641, 0.858),
    ArticleFigure("logo", 0.709, 0.974),
)


def figure_for(prompt: str) -> ArticleFigure | None:
    """The article's figure for a prompt that names the same scene, if it has one."""
    return next((figure for figure in FIGURES if figure.key in prompt.lower()), None)
