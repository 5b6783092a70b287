r"""Which timesteps a training draws, as quantile functions of one uniform number u an example.

    uniform         t = u
    logit_normal    t = sigmoid(m + s Φ⁻¹(u))                         m > 0 leans to noise
    mode            t = u - k (1 - u - cos²(π u / 2))                 k > 0 leans to the middle, k < 0 to the ends
    cosmap          t = 1 - 1 / (tan(π u / 2) + 1)

then the process's shift, `t' = a t / (1 + (a - 1) t)`, where it has one, and the range, `least + (most - least) t'`.
t = 1 is noise alone. A stratified draw gives example i of B the u of `[i / B, (i + 1) / B)`.

Source: P. Esser et al., arXiv 2403.03206 (SD 3), 3.1. PyTorch's training scripts index a descending grid of timesteps
with the first: theirs is mirrored.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

Kind = Literal["uniform", "logit_normal", "mode", "cosmap"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Density:
    """The timesteps of a training, as shares of the process's: 0 is no noise, 1 noise alone.

    Attributes:
        mean, std: m and s of `logit_normal`.
        scale: k of `mode`.
        least, most: the range of the timesteps, after all else.
        strata: the global batch size where draws are stratified; 0: they are independent.
    """

    kind: Kind = "uniform"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 0.0
    least: float = 0.0
    most: float = 1.0
    strata: int = 0

    @property
    def is_independent_uniform(self) -> bool:
        """Whether a whole number drawn at random between the bounds is all there is to it."""
        return self.kind == "uniform" and self.strata == 0

    def draw(self, key: Key[Array, ""], position: Int[Array, ""], shift: float = 1.0) -> Float[Array, ""]:
        """The timestep of one example, whose place in the global batch is `position`."""
        u = jax.random.uniform(key)
        if self.strata:
            u = (position + u) / self.strata
        return self.quantile(u, shift)

    def quantile(self, u: Float[Array, "*s"], shift: float = 1.0) -> Float[Array, "*s"]:
        """The timestep below which the share u of all draws lies."""
        match self.kind:
            case "logit_normal":
                t = jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u))
            case "mode":
                t = u - self.scale * (1.0 - u - jnp.cos(0.5 * jnp.pi * u) ** 2)
            case "cosmap":
                t = 1.0 - 1.0 / (jnp.tan(0.5 * jnp.pi * u) + 1.0)
            case _:
                t = u
        return self.least + (self.most - self.least) * shifted(t, shift)

    def share_above(self, timestep: float, shift: float = 1.0) -> float:
        """The share of all draws that is noisier than a timestep."""
        t = min(max((timestep - self.least) / (self.most - self.least), 0.0), 1.0)
        if t in (0.0, 1.0):
            return 1.0 - t
        t = shifted(t, 1.0 / shift)
        match self.kind:
            case "logit_normal":
                normal = (math.log(t / (1.0 - t)) - self.mean) / self.std
                return 0.5 * math.erfc(normal / math.sqrt(2.0))
            case "mode":  # it has no inverse in closed form
                low, high = 0.0, 1.0
                for _ in range(60):
                    u = 0.5 * (low + high)
                    is_below = u - self.scale * (1.0 - u - math.cos(0.5 * math.pi * u) ** 2) <= t
                    low, high = (u, high) if is_below else (low, u)
                return 1.0 - low
            case "cosmap":
                return 1.0 - 2.0 / math.pi * math.atan(t / (1.0 - t))
        return 1.0 - t


def shifted(t: Any, shift: float) -> Any:
    """`a t / (1 + (a - 1) t)`: σ/α = t / (1 - t) times a. A shift of 1 is t itself, bit for bit."""
    return t if shift == 1.0 else shift * t / (1.0 + (shift - 1.0) * t)


def make_density(
    timesteps: ConfigDict, num_train_timesteps: int, least: int, most: int, global_batch_size: int
) -> Density:
    """The density of the section `timesteps` of a config, whose fields have been checked.

    Args:
        num_train_timesteps: of the process.
        least, most: the timesteps that are drawn, of these; a `most` of 0 is the last.
    """
    return Density(
        kind=timesteps.density,
        mean=timesteps.mean,
        std=timesteps.std,
        scale=timesteps.mode_scale,
        least=least / num_train_timesteps,
        most=(most or num_train_timesteps) / num_train_timesteps,
        strata=global_batch_size if timesteps.stratified else 0,
    )
