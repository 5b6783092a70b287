"""What N. Guttenberg's "Diffusion with Offset Noise" reports (CrossLabs, 2023), to compare a re-enactment with.

Mean brightness of the pictures for four prompts, 0 black and 1 white, by Stable Diffusion before and after about
1,000 steps of fine-tuning on 40 pictures with `offset_strength` 0.1.
"""

from typing import Any

from offsetjax.report.section import Reference

SOURCE = 'N. Guttenberg, "Diffusion with Offset Noise", CrossLabs 2023'
OFFSET_STRENGTH = 0.1
STEPS = 1000
BLACK_STEPS = 3000  # of plain fine-tuning on one black picture, after which "all black" was still not black

# By words that name the scene.
FIGURES = {
    "town square": Reference("the article", 0.452, 0.031),
    "dark alley": Reference("the article", 0.301, 0.032),
    "ski slope": Reference("the article", 0.641, 0.858),
    "logo": Reference("the article", 0.709, 0.974),
}

NOTE = (
    f"“The article”: {SOURCE}; Stable Diffusion before and after about {STEPS:,} steps on 40 pictures with an offset "
    f"of {OFFSET_STRENGTH:g}, its own prompts. Another model and other data: the directions compare, the values only "
    "roughly."
)
NUMBERS: dict[str, Any] = {
    "source": SOURCE,
    "offset_strength": OFFSET_STRENGTH,
    "steps": STEPS,
    "brightness": {scene: {"before": each.before, "after": each.after} for scene, each in FIGURES.items()},
}


def figure_for(prompt: str) -> Reference | None:
    """The article's figure for a prompt that names the same scene, if it has one."""
    return next((figure for scene, figure in FIGURES.items() if scene in prompt.lower()), None)
