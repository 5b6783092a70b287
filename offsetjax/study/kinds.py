"""A picture of the kinds of noise: one draw of each, and its power by wavelength."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from offsetjax.config import default_config, validate
from offsetjax.diffusion.noise import Noise, make_noise
from offsetjax.diffusion.process import make_process
from offsetjax.diffusion.spectrum import frequencies
from offsetjax.plots import colour, style

SIDE = 64
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offset .1": {"offset_strength": 0.1},
    "pyramid .3, 6": {"kind": "pyramid", "pyramid_discount": 0.3, "pyramid_levels": 6},
    "pyramid .8, 6": {"kind": "pyramid", "pyramid_discount": 0.8, "pyramid_levels": 6},
    "spectral\n0.4 + 0.1 / (f + .01)": {"kind": "spectral", "spectrum": ("0.4 + 0.1 / (f + 0.01)",)},
    "adjusted .1\nt = 499": {"kind": "adjusted", "offset_strength": 0.1},
    "adjusted .1\nt = 999": {"kind": "adjusted", "offset_strength": 0.1},
}


def noise_of(settings: dict[str, Any]) -> Noise:
    """The noise of a config with these fields."""
    config = default_config()
    config.noise.update(settings)
    validate(config)
    return make_noise(config.noise, make_process(config.schedule), downscale=8)


@style
def figure() -> Figure:
    """A column a kind: a draw of one channel, and the power of its modes by wavelength."""
    canvas = Figure(figsize=(11, 3.8), layout="constrained")
    panels = canvas.subplots(2, len(KINDS), sharey="row", height_ratios=(1, 0.9))
    fy, fx = frequencies(SIDE, SIDE)
    radius = np.hypot(fy, fx)
    for column, (name, settings) in enumerate(KINDS.items()):
        noise, timestep = noise_of(settings), 499 if "499" in name else 999
        # This key's shift is 2.1 standard deviations: one that shows.
        draw = noise.draw(jax.random.key(8), jnp.zeros((1, SIDE, SIDE)), jnp.int32(timestep))
        panels[0, column].imshow(draw[0], cmap="gray", vmin=-3.5, vmax=3.5)
        panels[0, column].set_axis_off()
        panels[0, column].set_title(name, fontsize=8)
        power = noise.power(SIDE, SIDE, timestep)[0]
        away = radius > 0
        order = np.argsort(radius[away])
        axes = panels[1, column]
        axes.plot(1 / radius[away][order], power[away][order], ".", ms=2, color=colour(0))
        axes.plot(160, power[0, 0], "o", ms=5, color=colour(1))
        axes.set(xscale="log", yscale="log", xlim=(1.2, 260), ylim=(0.3, 1000))
        axes.set_xticks([2, 8, 64, 160], ["2", "8", "64", "all"])
        axes.minorticks_off()
        axes.grid(color="#EEEEEE")
    panels[1, 0].set_ylabel("power of a mode")
    canvas.supxlabel("wavelength in latent pixels; all: the mean of the channel", fontsize=9)
    return canvas
