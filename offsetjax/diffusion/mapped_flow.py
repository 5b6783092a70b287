r"""A flow for a network that keeps to its own terms: one that predicts ε or v at timesteps of its own schedule.

The path is a flow's, in the scale that such a network knows:

    x'_t = x_t / s = α' x0 + σ' n,    α' = (1-t) / s,  σ' = t / s,  s = √((1-t)² + t²)

The network receives the τ, a fraction too, at which its own schedule has the same ratio `σ_τ/α_τ = t / (1-t)`. What it
predicts stands for `x̂0 = (x' - σ_τ ε̂) / α_τ` or `x̂0 = α_τ x' - σ_τ v̂`, and so for the velocity `(x_t - x̂0) / t` of
the flow: before any training the flow is the one that the model implies. The loss is the flow's: an error of x̂0 over t.

A schedule that does not end in noise alone knows ratios up to `σ_T/α_T`, in Stable Diffusion 14.6, at t = .936. Beyond
it the network receives T, and the two formulas stay those of T: it then sees less of a picture than it was trained to,
down to none at t = 1, and learns what to make of it. That is also where programs which know nothing of flows start it:
from noise alone, at T. So what is exported is a model of ε or v, which every program draws.

Source: after J. Schusterbauer et al., "Diff2Flow", arXiv 2506.02221.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from offsetjax.diffusion.density import Density
from offsetjax.diffusion.process import Grid, Process, is_traced

_MOST = 1e4  # of σ/α, where a schedule ends in noise alone


@dataclass(frozen=True, eq=False)
class MappedFlow:
    """The process.

    Attributes:
        flow: the path, in t.
        network: the process whose terms are the network's: variance preserving, with whole timesteps.
        is_velocity: whether that predicts v.
    """

    flow: Process
    network: Process
    is_velocity: bool

    includes_rate = False

    @property
    def num_train_timesteps(self) -> int:
        return self.flow.num_train_timesteps

    @property
    def last_timestep(self) -> Any:
        return self.flow.last_timestep

    @property
    def predicts(self) -> str:
        return self.network.predicts

    @cached_property
    def _ratios(self) -> Float[np.ndarray, " T"]:
        """σ/α of the network's timesteps."""
        alpha, sigma = self.network.scales(np.arange(self.network.num_train_timesteps))
        return sigma / np.maximum(alpha, sigma / _MOST)

    def scales(self, timestep: Any) -> tuple[Any, Any]:
        alpha, sigma = self.flow.scales(timestep)
        scale = self._scale(timestep)
        return alpha / scale, sigma / scale

    def _scale(self, timestep: Any) -> Any:
        alpha, sigma = self.flow.scales(timestep)
        return (alpha**2 + sigma**2) ** 0.5

    def _known(self, timestep: Any) -> tuple[Any, Any]:
        """`α_τ` and `σ_τ`: α' and σ', as far as the network's schedule goes."""
        ratio = self._known_ratio(timestep)
        alpha = (1.0 + ratio**2) ** -0.5
        return alpha, ratio * alpha

    def _known_ratio(self, timestep: Any) -> Any:
        alpha, sigma = self.flow.scales(timestep)
        numpy: Any = jnp if is_traced(timestep) else np
        # Neither end divides by 0.
        return numpy.clip(sigma / numpy.maximum(alpha, 1e-6), self._ratios[0], self._ratios[-1])

    def snr(self, timestep: Any) -> Any:
        return self.flow.snr(timestep)

    def growth(self, timestep: Any) -> tuple[Any, Any]:
        return self.flow.growth(timestep)

    def shift_at(self, pixels: int) -> float:
        return self.flow.shift_at(pixels)

    def draw_timestep(self, key: Key[Array, ""], density: Density, position: Int[Array, ""], pixels: int) -> Any:
        return self.flow.draw_timestep(key, density, position, pixels)

    def timestep_at(self, number: Any) -> Any:
        return self.flow.timestep_at(number)

    def network_timestep(self, timestep: Any) -> Any:
        """τ."""
        numpy: Any = jnp if is_traced(timestep) else np
        known = numpy.log(self._known_ratio(timestep))
        numbers = numpy.arange(len(self._ratios), dtype=known.dtype)
        return numpy.interp(known, numpy.asarray(np.log(self._ratios), known.dtype), numbers)

    def target(
        self, latent: Float[Array, "*s"], noise: Float[Array, "*s"], rate: Any, timestep: Any
    ) -> Float[Array, "*s"]:
        """What stands for x0: ε or v itself, as far as the network's schedule goes."""
        alpha, sigma = self.scales(timestep)
        known_alpha, known_sigma = self._known(timestep)
        # Of x' - α_τ x0, written such that it is the noise itself where the two schedules agree.
        rest = sigma / known_sigma * noise + (alpha - known_alpha) / known_sigma * latent
        return known_alpha * rest - known_sigma * latent if self.is_velocity else rest

    def to_latent_and_noise(
        self, noisy: Float[Array, "*s"], prediction: Float[Array, "*s"], timestep: Any
    ) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
        alpha, sigma = self.scales(timestep)
        known_alpha, known_sigma = self._known(timestep)
        if self.is_velocity:
            latent = known_alpha * noisy - known_sigma * prediction
        else:
            latent = (noisy - known_sigma * prediction) / known_alpha
        return latent, (noisy - alpha * latent) / sigma

    def error_gain(self, timestep: Any) -> Any:
        known_alpha, known_sigma = self._known(timestep)
        return known_sigma**-2.0 if self.is_velocity else (known_alpha / known_sigma) ** 2

    def weight(self, timestep: Any) -> Any:
        """`1 / (t² error_gain)`: what an error of the prediction is as one of the flow's velocity."""
        numpy: Any = jnp if is_traced(timestep) else np
        _, sigma = self.flow.scales(timestep)
        least = self._ratios[0] / (1.0 + self._ratios[0])  # below, the network cannot tell x0 from x_t
        return 1.0 / (self.error_gain(timestep) * numpy.maximum(sigma, least) ** 2)

    def grid(self, sampler: str, num_steps: int, spacing: str, shift: float) -> Grid:
        """The flow's, in the network's scale."""
        grid = self.flow.grid(sampler, num_steps, "trailing", shift)
        scale, after = self._scale(grid.timesteps), self._scale(grid.timesteps_after)
        return replace(
            grid,
            network_timesteps=self.network_timestep(grid.timesteps),
            alpha=grid.alpha / scale,
            sigma=grid.sigma / scale,
            alpha_after=grid.alpha_after / after,
            sigma_after=grid.sigma_after / after,
            scale=1.0 / scale,
            start=grid.start / float(scale[0]),
        )

    def scheduler(self, sampler: str, spacing: str, shift: float) -> dict[str, Any]:
        return self.network.scheduler(sampler, spacing, shift)

    @property
    def exported(self) -> Process:
        return self.network

    def advice(self, shift: float) -> str:
        return (
            f"It was trained along a flow's path, in the terms of its base: it predicts {self.predicts}, and is drawn "
            "as its base is, with trailing timesteps, by any program. No node for flows must be used with it."
        )

    def exported_sampler(self, sampler: Any) -> Any:
        return self.network.exported_sampler(sampler)

    def metadata(self) -> dict[str, str]:
        return {**self.network.metadata(), "offsetjax.conversion": "mapped"}


def rules(values: Mapping[str, Any]) -> Iterator[tuple[object, str]]:
    """What does not go with `schedule.conversion = "mapped"`."""
    yield (
        not values["model.pretrained"],
        "schedule.conversion = 'mapped' needs model.pretrained, a model that predicts ε or v; leave it out",
    )
    yield (
        values["noise.kind"] == "adjusted",
        "schedule.conversion = 'mapped' cannot apply to noise.kind = 'adjusted', whose change with time the network's "
        "own terms do not know; use schedule.conversion = 'plain'",
    )
    yield (
        values["schedule.zero_terminal_snr"] and values["schedule.prediction_type"] == "epsilon",
        "schedule.zero_terminal_snr needs schedule.prediction_type = 'v_prediction'",
    )
    yield (
        values["schedule.zero_terminal_snr"] and values["sample.sampler"] == "heun",
        "sample.sampler = 'heun' cannot be exported with schedule.conversion = 'mapped' and "
        "schedule.zero_terminal_snr: others' programs divide by the signal, of which the last timestep has none; use "
        "euler, dpmpp_2m or unipc",
    )
    yield (
        values["sample.num_steps"] > values["schedule.num_train_timesteps"],
        f"sample.num_steps = {values['sample.num_steps']} must be at most {values['schedule.num_train_timesteps']} "
        "with schedule.conversion = 'mapped', whose export is drawn at whole timesteps",
    )
