"""The weakest offset that returns a share of the spread of brightness, looked for one after the other."""

import numpy as np
from jaxtyping import Float

from offsetjax.diffusion.density import Density
from offsetjax.diffusion.noise import PLAIN, Noise
from offsetjax.diffusion.process import Process
from offsetjax.diffusion.spread import Drawing, reach


def offset_that_returns(
    process: Process,
    density: Density,
    drawing: Drawing,
    deviation: float | Float[np.ndarray, " c"],
    height: int,
    width: int,
    least: float = 0.95,
) -> float | None:
    """The weakest offset, to two digits, on top of white noise, with which a share of the spread comes back; 0: plain
    noise does; None: no strength up to 1.
    """
    for strength in (0.0, *np.round(10.0 ** np.linspace(-2, 0, 41), 3)):
        noise = PLAIN if strength == 0 else Noise("offset", np.array([strength]))
        found = reach(process, noise, density, drawing, deviation, height, width)
        if found.matched >= least:
            return float(strength)
    return None
