r"""The noise of a training: what its latents are noised with, what its sampler starts from and injects.

For one latent `x0` of shape `[c, h, w]`, with `N = h w`, at timestep t:

    n_t = √Σ ε + ψ_t c ξ,    ε ~ N(0, I) for each pixel,    ξ ~ N(0, 1) for each channel, the same for all its pixels

`n_t` is also the target of the loss. `c` is `offset_strength`, called `noise_offset` by kohya's scripts and diffusers.

    offset      Σ = I, ψ = 1: a channel's mean has the variance (1 + c² N) / N, all other modes are those of plain noise
    pyramid     Σ of multi-resolution noise, with or without an offset               (spectrum.py)
    spectral    Σ of any power spectrum                                              (spectrum.py)
    adjusted    Σ = I, ψ_t from 0 to 1: the shift grows with time                     (the process's `growth`)

What sets it apart from plain noise may vanish over the last part of a training: with the weight w, of `weight_at` a
step, c becomes w c and the power of each mode `1 + w² (P - 1)`.

Sources: N. Guttenberg, "Diffusion with Offset Noise", CrossLabs, 2023; T. Kutsuna, "Generalized Diffusion Model with
Adjusted Offset Noise", arXiv 2412.03134.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from offsetjax.diffusion.process import Process, Timestep
from offsetjax.diffusion.spectrum import colour, formula_spectrum, mean_power, pyramid_spectrum

Kind = Literal["offset", "pyramid", "spectral", "adjusted"]


@jax.jit
def offset_noise(
    key: Key[Array, ""], latent: Float[Array, "c h w"], strength: float | Float[Array, ""] | Float[Array, "c 1 1"]
) -> Float[Array, "c h w"]:
    """Noise for ONE latent; use `jax.vmap` with one key an example for a batch.

    Args:
        key: the example's own key.
        latent: gives the shape and the floating type; its values are not used.
        strength: standard deviation `c` of the shift of each channel's mean; 0 is plain noise, bit for bit.

    Returns:
        `ε + strength ξ`, of the latent's shape and type.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> jax.vmap(offset_noise, in_axes=(0, 0, None))(keys, jnp.zeros((2, 4, 64, 64)), 0.1).shape
        (2, 4, 64, 64)
    """
    pixel_key, offset_key = jax.random.split(key)
    pixels = jax.random.normal(pixel_key, latent.shape, latent.dtype)
    return pixels + _shift(offset_key, latent, jnp.asarray(strength, latent.dtype))


def _shift(
    key: Key[Array, ""], latent: Float[Array, "c h w"], strength: Float[Array, "#c 1 1"] | Float[Array, ""]
) -> Float[Array, "c 1 1"]:
    """`strength ξ`, rounded at each operation: fused in another way on another mesh, it would have other bits."""
    xi = jax.lax.optimization_barrier(jax.random.normal(key, (latent.shape[0], 1, 1), latent.dtype))
    return jax.lax.optimization_barrier(strength * xi)


@dataclass(frozen=True)
class Noise:
    """One noise for training and sampling; `make_noise` makes it from a config.

    `draw`, `start` and `inject` are for one example: `jax.vmap` them over keys. Of an example's key, `fold_in` 0 and 1
    (which `split` gives) draw the pixels and the shift, 2 its strength, 3 whether it has one, and 4 a start's latent;
    5 is free for what a sampler injects.
    """

    kind: Kind
    strengths: Float[np.ndarray, " c"]  # c of each channel (or one for all), for a square latent of `reference_pixels`
    reference_pixels: float = 0.0  # 0: whatever the latent's size
    shift_at: Callable[[int], float] = lambda pixels: 1.0  # the process's
    random_strength: bool = False
    probability: float = 1.0
    adaptive_scale: float = 0.0
    data_mean: tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]] | None = None
    spectrum: Callable[[int, int], Float[np.ndarray, "#c h w2"]] | None = None  # of √Σ; None: white
    growth: Callable[[Any], tuple[Any, Any]] | None = None  # t → ψ_t and its derivative; None: 1 at every timestep
    weight: Any = 1.0  # w, of what sets it apart from plain noise; traced in a training

    @property
    def is_plain(self) -> bool:
        """Whether `n` is white."""
        return self.spectrum is None and not self.strengths.any() and not self.adaptive_scale

    def weighted(self, weight: Any) -> "Noise":
        """The noise with a weight; plain noise where that is a 0 which is known."""
        return PLAIN if isinstance(weight, float) and weight == 0.0 else replace(self, weight=weight)

    @property
    def _is_whole(self) -> bool:
        return isinstance(self.weight, float) and self.weight == 1.0

    def shift_from_reference(self, pixels: int) -> float:
        """`k`: what the process multiplies σ/α by at this size, relative to the size that the strengths are for."""
        if not self.reference_pixels:
            return 1.0
        return self.shift_at(pixels) / self.shift_at(round(self.reference_pixels))

    def strengths_at(self, height: int, width: int) -> Any:
        """The strengths `[c]` in effect for latents of a size, without the adaptive part.

        The mean's SNR, at the last timestep and at any share of the timesteps, is what it is at the reference's size:
        `c'² = (V + c²) / k² - V'`, V the variance of a channel's mean without an offset, 1/N for white noise. On one
        and the same schedule (k = 1) this is nearly the same strength at every size; `c √N` is kept where the schedule
        is shifted by `k = √(N'/N)`. A channel without an offset has none at any size.
        """
        whole = self._whole_strengths_at(height, width)
        return whole if self._is_whole else self.weight * whole

    def _whole_strengths_at(self, height: int, width: int) -> Float[np.ndarray, " c"]:
        pixels = height * width
        if not self.reference_pixels or pixels == self.reference_pixels:
            return self.strengths
        effective = self._mean_variance_at_reference() + self.share * self.strengths**2
        rest = effective / self.shift_from_reference(pixels) ** 2 - self._white_mean_variance(height, width)
        return np.where(self.strengths > 0, np.sqrt(np.maximum(rest, 0.0) / self.share), 0.0)

    def strengths_for(self, effective: Float[np.ndarray, " c"], height: int, width: int) -> Float[np.ndarray, " c"]:
        """The inverse: the strengths whose root mean square for latents of a size, over examples, is `effective`."""
        pixels = height * width
        if not self.reference_pixels or pixels == self.reference_pixels:
            return effective / np.sqrt(self.share)
        total = (effective**2 + self._white_mean_variance(height, width)) * self.shift_from_reference(pixels) ** 2
        rest = np.maximum(total - self._mean_variance_at_reference(), 0.0)
        return np.where(effective > 0, np.sqrt(rest / self.share), 0.0)

    def adaptive_scale_at(self, pixels: int) -> Any:
        """The adaptive scale in effect: a strength that is not small goes with `1 / k`."""
        return self.weight * self.adaptive_scale / self.shift_from_reference(pixels)

    def coloured_power(self, height: int, width: int) -> Any:
        """Σ `[#c, h, w2]` in effect for latents of a size, without the offset; None: white."""
        if self.spectrum is None:
            return None
        whole = self.spectrum(height, width)
        return whole if self._is_whole else 1.0 + self.weight**2 * (whole - 1.0)

    @property
    def share(self) -> float:
        """The mean of the squared strengths, over examples, relative to the full strength's square."""
        return self.probability * (1 / 3 if self.random_strength else 1.0)

    def _mean_variance_at_reference(self) -> Float[np.ndarray, "#c"]:
        side = round(np.sqrt(self.reference_pixels))
        return self._white_mean_variance(side, side)

    def _white_mean_variance(self, height: int, width: int) -> Float[np.ndarray, "#c"]:
        """The variance of a channel's mean without an offset."""
        power = np.ones(1) if self.spectrum is None else self.spectrum(height, width)[:, 0, 0]
        return power / (height * width)

    def draw(
        self, key: Key[Array, ""], latent: Float[Array, "c h w"], timestep: Timestep | None = None
    ) -> Float[Array, "c h w"]:
        """`n_t`, the noise of training at `timestep`, in float32.

        Args:
            timestep: None is the last one, at which ψ is 1.
        """
        pixel_key, offset_key = jax.random.split(key)
        pixels = self._coloured(pixel_key, latent.shape)
        strength = self._strength(key, latent)
        if self.growth is not None and timestep is not None:
            strength = strength * self.growth(timestep)[0]
        return pixels + _shift(offset_key, pixels, strength)

    def rate(
        self, key: Key[Array, ""], latent: Float[Array, "c h w"], timestep: Timestep
    ) -> float | Float[Array, "c 1 1"]:
        """`dn_t/dt = dψ/dt c ξ` of what `draw` gives for the same key: 0 for noise that does not change with time."""
        if self.growth is None:
            return 0.0
        return _shift(jax.random.split(key)[1], latent, self._strength(key, latent) * self.growth(timestep)[1])

    def start(self, key: Key[Array, ""], shape: tuple[int, int, int]) -> Float[Array, "c h w"]:
        """What sampling starts from: the noise of the last timestep, for a latent that is not known yet."""
        latent = jnp.zeros(shape)
        if self.adaptive_scale and self.data_mean is not None:  # its mean is then drawn from the data's
            mean, deviation = (jnp.asarray(value, jnp.float32)[:, None, None] for value in self.data_mean)
            latent = latent + mean + _shift(jax.random.fold_in(key, 4), latent, deviation)
        return self.draw(key, latent)

    def inject(self, key: Key[Array, ""], shape: tuple[int, int, int]) -> Float[Array, "c h w"]:
        """What one step of an ancestral sampler adds, before its scale.

        `adjusted` noise has one shift for the whole chain, which the start has drawn: its steps add plain noise.
        """
        if self.kind == "adjusted":
            return jax.random.normal(jax.random.split(key)[0], shape)
        return self.draw(key, jnp.zeros(shape))

    def power(self, height: int, width: int, timestep: Any = None) -> Any:
        """The expected power spectrum `[c, h, w2]` of `n_t`, a channel; by default of the last timestep."""
        if not self._is_whole:
            return 1.0 + self.weight**2 * (self.weighted(1.0).power(height, width, timestep) - 1.0)
        spectrum = np.ones((1, height, width // 2 + 1)) if self.spectrum is None else self.spectrum(height, width)
        variance = self._shift_variance(height, width) * self._psi(timestep) ** 2
        power = np.repeat(spectrum, max(len(variance), len(spectrum)) // len(spectrum), 0)
        power[:, 0, 0] += variance * height * width
        return power

    def variance(self, height: int, width: int, timestep: Any = None) -> Any:
        """The expected variance of a pixel of `n_t`, over channels; by default at the last timestep."""
        if not self._is_whole:
            return 1.0 + self.weight**2 * (self.weighted(1.0).variance(height, width, timestep) - 1.0)
        colours = 1.0 if self.spectrum is None else mean_power(self.spectrum(height, width), width).mean()
        return colours + self._psi(timestep) ** 2 * self._shift_variance(height, width).mean()

    def _psi(self, timestep: Any) -> Any:
        return 1.0 if self.growth is None or timestep is None else self.growth(timestep)[0]

    def _coloured(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "c h w"]:
        white, power = jax.random.normal(key, shape), self.coloured_power(*shape[1:])
        if power is None:
            return white
        root = jnp.sqrt(power) if isinstance(power, jax.Array) else np.sqrt(power)
        return colour(white, jnp.asarray(root, jnp.float32))

    def _strength(self, key: Key[Array, ""], latent: Float[Array, "c h w"]) -> Float[Array, "#c 1 1"]:
        strength = jnp.asarray(self.strengths_at(*latent.shape[1:]), jnp.float32)[:, None, None]
        if self.random_strength:
            strength = strength * jax.random.uniform(jax.random.fold_in(key, 2))
        if self.adaptive_scale:
            means = jnp.abs(latent.mean((1, 2), keepdims=True))
            strength = jnp.maximum(strength + self.adaptive_scale_at(latent[0].size) * means, 0.0)
        if self.probability < 1.0:
            strength = strength * jax.random.bernoulli(jax.random.fold_in(key, 3), self.probability)
        return strength

    def _shift_variance(self, height: int, width: int) -> Float[np.ndarray, " c"]:
        """E[c²] of each channel: over the random strengths, and over the data's means where they are known."""
        strength = self.strengths_at(height, width)[:, None, None]
        nodes, weights = np.polynomial.legendre.leggauss(16)
        if self.random_strength:
            strength = strength * (0.5 + 0.5 * nodes)[:, None]
        weight = (weights / 2)[:, None] if self.random_strength else np.ones((1, 1))
        if self.adaptive_scale:
            quantiles = np.linspace(-5.0, 5.0, 201)
            density = np.exp(-(quantiles**2) / 2)
            mean, deviation = self.data_mean or (np.zeros(1), np.zeros(1))
            means = mean[:, None, None] + deviation[:, None, None] * quantiles
            strength = np.maximum(strength + self.adaptive_scale_at(height * width) * np.abs(means), 0.0)
            weight = weight * density / density.sum()
        return self.probability * (strength**2 * weight).sum((1, 2))


PLAIN = Noise("offset", np.zeros(1))


def weight_at(step: Any, num_steps: int, share: float) -> Any:
    """w after so many steps of a training whose last `share` makes its noise plain, `(1 - cos π u) / 2`.

    u goes from 1 to 0 over that share. w is flat at both ends: most of the way down is behind when a third is left, in
    which the network gets used to noise that is nearly plain.

    Args:
        step: a number, for which w is one, or a traced one.
    """
    if share == 0:
        return 1.0
    if not isinstance(step, jax.Array):
        left = min(max((num_steps - step) / (share * num_steps), 0.0), 1.0)
        return 0.5 - 0.5 * math.cos(math.pi * left)
    left = jnp.clip((num_steps - step) / (share * num_steps), 0.0, 1.0)
    # The same bits wherever it is used.
    return jax.lax.optimization_barrier(jnp.float32(0.5 - 0.5 * jnp.cos(jnp.pi * left)))


def make_noise(settings: ConfigDict, process: Process, downscale: int) -> Noise:
    """The noise of the section `noise` of a config, whose fields have been checked.

    Args:
        downscale: pixels of a picture a latent pixel, on a side.
    """
    spectra: dict[str, Callable[[int, int], Float[np.ndarray, "#c h w2"]]] = {
        "pyramid": lambda h, w: pyramid_spectrum(h, w, settings.pyramid_discount, settings.pyramid_levels)[None],
        "spectral": lambda h, w: np.stack([formula_spectrum(formula, h, w) for formula in settings.spectrum]),
    }
    spectrum = spectra.get(settings.kind)
    return Noise(
        kind=settings.kind,
        strengths=np.array(settings.channel_strengths or (settings.offset_strength,), np.float64),
        reference_pixels=(settings.reference_resolution / downscale) ** 2,
        shift_at=process.shift_at,
        random_strength=settings.random_strength,
        probability=settings.probability,
        adaptive_scale=settings.adaptive_scale,
        data_mean=(np.array(settings.data_mean), np.array(settings.data_mean_std)) if settings.data_mean else None,
        spectrum=cache(spectrum) if spectrum else None,
        growth=process.growth if settings.kind == "adjusted" else None,
    )


def describe(noise: Noise, settings: ConfigDict, height: int, width: int) -> str:
    """That section in words, with the strength in effect: `offset, strength 0.1 for 64x64 latents (c √N = 6.4)`."""
    perturbed = f", with {settings.input_perturbation:g} more in the input" * (settings.input_perturbation > 0)
    if noise.is_plain:
        return "plain" + perturbed
    strengths = noise.strengths_at(height, width)
    text: str = noise.kind
    left = f", annealed to {noise.weight:.3g} of its full strength" * (noise.weight != 1.0)
    if noise.kind == "pyramid":
        text += f" of {settings.pyramid_levels} levels, discount {settings.pyramid_discount:g}"
    if noise.kind == "spectral":
        text += " " + ", ".join(formula[:80] for formula in settings.spectrum)
    if strengths.any():
        each, invariants = (
            ", ".join(f"{value:.4g}" for value in values) for values in (strengths, strengths * np.sqrt(height * width))
        )
        text += f", strength {each} for {height}x{width} latents (c √N = {invariants})"
    text += ", uniform from 0 to that by example" * noise.random_strength
    if noise.probability < 1:
        text += f", for a share of {noise.probability:g} of the examples"
    if noise.adaptive_scale:
        scale = noise.adaptive_scale_at(height * width)
        text += f", and {scale:.4g} times the absolute mean of a latent's channel"
    return text + left + perturbed
