"""How a training noises latents: by which process, with which noise, and at which timesteps."""

from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from offsetjax.diffusion.density import Density
from offsetjax.diffusion.noise import Noise, weight_at
from offsetjax.diffusion.process import Process


@dataclass(frozen=True)
class Noising:
    """How a training noises latents.

    Attributes:
        density: of the timesteps that it draws.
        whole: its noise before `noise.anneal` makes any difference.
        settings: the section `noise` of its config.
        num_steps: of the whole training.
    """

    process: Process
    density: Density
    whole: Noise
    settings: ConfigDict
    num_steps: int

    def noise(self, step: Any = None) -> Noise:
        """The noise of the training.

        Args:
            step: after which, a number or a traced one; None: before `noise.anneal` makes any difference.
        """
        if step is None:
            return self.whole
        return self.whole.weighted(weight_at(step, self.num_steps, self.settings.anneal))
