r"""The variance-preserving process of T discrete timesteps, and its parameterisations ε and v.

    x_t = √ᾱ_t x0 + √(1-ᾱ_t) n            ᾱ_t = Π_{i≤t} (1-β_i)      SNR_t = ᾱ_t / (1-ᾱ_t)
    v_t = √ᾱ_t n - √(1-ᾱ_t) x0

β is "scaled linear", linear in √β, as in Stable Diffusion. With a zero terminal SNR nothing of the picture is left at
the last timestep. Noise that changes with time is balanced: `ψ_t = s_t / s_T` with `s = √((1-ᾱ)/ᾱ)`, for which noise
and target of T. Kutsuna's adjusted offset noise agree.

Sources: J. Ho et al., arXiv 2006.11239; R. Rombach et al., arXiv 2112.10752; T. Salimans and J. Ho, arXiv 2202.00512
(v); S. Lin et al., arXiv 2305.08891 (zero terminal SNR); T. Kutsuna, arXiv 2412.03134 (adjusted noise).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from offsetjax.diffusion.density import Density
from offsetjax.diffusion.process import Grid, is_traced

PredictionType = Literal["epsilon", "v_prediction"]

# What only a flow has.
_OF_FLOWS = {
    "schedule.shift": 1.0,
    "schedule.shift_rule": "fixed",
    "schedule.shift_resolution": 0,
    "schedule.conversion": "plain",
    "sample.shift": 0.0,
    "loss.weighting": "none",
}
# Of a scheduler's JSON: what may be there, and what is read.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("scaled_linear",),
    "prediction_type": ("epsilon", "v_prediction"),
    "trained_betas": (None,),
}
_STORED = ("num_train_timesteps", "beta_start", "beta_end", "prediction_type")
_SKIPPING = ("dpmpp_2m", "unipc")
_TRAILING_START = ("euler", "euler_ancestral", "heun")  # whose PyTorch counterparts begin with noise scaled by σ_T


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """The process; `alphas_cumprod` is ᾱ, the signal's variance kept at each of the T timesteps."""

    alphas_cumprod: Float[np.ndarray, " T"]
    prediction_type: PredictionType
    betas: tuple[float, float] = (0.00085, 0.012)  # the first and the last, and whether the last SNR was made 0:
    zero_terminal_snr: bool = False  # how PyTorch's schedulers are configured for the same ᾱ

    includes_rate = False

    @classmethod
    def make(cls, schedule: Mapping[str, Any], downscale: int) -> "VariancePreserving":
        """The process of `config.schedule`."""
        return variance_preserving(
            schedule["num_train_timesteps"],
            schedule["beta_start"],
            schedule["beta_end"],
            schedule["prediction_type"],
            schedule["zero_terminal_snr"],
        )

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]

    @property
    def last_timestep(self) -> int:
        return self.num_train_timesteps - 1

    @property
    def predicts(self) -> str:
        return {"epsilon": "ε", "v_prediction": "v"}[self.prediction_type]

    def scales(self, timestep: Any) -> tuple[Any, Any]:
        kept = self._kept(timestep)
        root = jnp.sqrt if is_traced(timestep) else np.sqrt
        return root(kept), root(1.0 - kept)

    def snr(self, timestep: Any) -> Any:
        kept = self._kept(timestep)
        return kept / (1.0 - kept)

    def _kept(self, timestep: Any) -> Any:
        if is_traced(timestep):
            return jnp.asarray(self.alphas_cumprod)[timestep]
        return np.asarray(self.alphas_cumprod, np.float64)[timestep]

    def growth(self, timestep: Any) -> tuple[Any, float]:
        kept = np.asarray(self.alphas_cumprod, np.float64)
        sigma = np.sqrt((1.0 - kept) / kept)
        psi = sigma / sigma[-1]
        return (jnp.asarray(psi, jnp.float32) if is_traced(timestep) else psi)[timestep], 0.0

    def shift_at(self, pixels: int) -> float:
        return 1.0

    def draw_timestep(
        self, key: Key[Array, ""], density: Density, position: Int[Array, ""], pixels: int
    ) -> Int[Array, ""]:
        count = self.num_train_timesteps
        if density.is_independent_uniform:
            return jax.random.randint(key, (), round(density.least * count), round(density.most * count))
        return jnp.minimum(jnp.int32(density.draw(key, position) * count), count - 1)

    def timestep_at(self, number: Any) -> Any:
        return number

    def network_timestep(self, timestep: Int[Array, "*b"]) -> Int[Array, "*b"]:
        return timestep

    def target(
        self, latent: Float[Array, "*s"], noise: Float[Array, "*s"], rate: Any, timestep: Int[Array, ""]
    ) -> Float[Array, "*s"]:
        """The noise itself, or the velocity."""
        if self.prediction_type == "epsilon":
            return noise
        alpha, sigma = self.scales(timestep)
        return alpha * noise - sigma * latent

    def to_latent_and_noise(
        self, noisy: Float[Array, "*s"], prediction: Float[Array, "*s"], timestep: Int[Array, ""]
    ) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
        alpha, sigma = self.scales(timestep)
        if self.prediction_type == "epsilon":
            return (noisy - sigma * prediction) / alpha, prediction
        return alpha * noisy - sigma * prediction, alpha * prediction + sigma * noisy

    def error_gain(self, timestep: Int[Array, ""]) -> Float[Array, ""]:
        """`SNR_t` for ε, `SNR_t + 1` for v."""
        return self.snr(timestep) + (self.prediction_type == "v_prediction")

    def weight(self, timestep: Int[Array, ""]) -> float:
        return 1.0

    def grid(self, sampler: str, num_steps: int, spacing: str, shift: float = 1.0) -> Grid:
        timesteps = timestep_grid(self.num_train_timesteps, num_steps, spacing, sampler)
        kept = np.asarray(self.alphas_cumprod, np.float64)
        if sampler == "ddim":  # it counts back from each step, and ends at ᾱ_0 (diffusers: set_alpha_to_one=False)
            after = np.maximum(timesteps - len(kept) // num_steps, 0)
            kept_after = kept[after]
        else:
            after = np.append(timesteps[1:], 0)
            kept_after = np.append(kept[timesteps[1:]], 1.0)
        alpha, sigma = self.scales(timesteps)
        return Grid(
            timesteps,
            network_timesteps=timesteps,
            timesteps_after=after,
            alpha=alpha,
            sigma=sigma,
            alpha_after=np.sqrt(kept_after),
            sigma_after=np.sqrt(1.0 - kept_after),
            # At a zero SNR it is infinite; the value that diffusers gives it there keeps differences finite.
            log_snr=np.log(np.maximum(alpha, 2.0**-12) / sigma),
            scale=alpha,
            start=float(sigma[0]) if sampler in _TRAILING_START and spacing == "trailing" else 1.0,
        )

    def scheduler(self, sampler: str, spacing: str, shift: float = 1.0) -> dict[str, Any]:
        name, settings = _SCHEDULERS[sampler]
        return {
            "_class_name": name,
            "beta_end": self.betas[1],
            "beta_start": self.betas[0],
            "num_train_timesteps": self.num_train_timesteps,
            "prediction_type": self.prediction_type,
            "rescale_betas_zero_snr": self.zero_terminal_snr,
            "beta_schedule": "scaled_linear",
            "steps_offset": 1,
            "timestep_spacing": spacing,
            **settings,
        }

    @property
    def exported(self) -> "VariancePreserving":
        return self

    def advice(self, shift: float) -> str:
        return ""

    def exported_sampler(self, sampler: Any) -> Any:
        return sampler

    def metadata(self) -> dict[str, str]:
        is_velocity = self.prediction_type == "v_prediction"
        return {
            "modelspec.prediction_type": "v" if is_velocity else "epsilon",
            "ss_zero_terminal_snr": str(self.zero_terminal_snr),
            "ss_v_parameterization": str(is_velocity),
        }

    @staticmethod
    def recognise(scheduler: Mapping[str, Any]) -> dict[str, Any] | None:
        if any(scheduler.get(key, values[0]) not in values for key, values in _SUPPORTED.items()):
            return None
        said = {key: scheduler[key] for key in _STORED if key in scheduler}
        return said | ({"zero_terminal_snr": True} if scheduler.get("rescale_betas_zero_snr") else {})

    @staticmethod
    def rules(values: Mapping[str, Any]) -> Iterator[tuple[object, str]]:
        steps = values["schedule.num_train_timesteps"]
        yield (
            values["schedule.beta_start"] >= values["schedule.beta_end"],
            "schedule.beta_start must be below schedule.beta_end",
        )
        # "leading" starts one step late (steps_offset = 1): with as many steps as the schedule it would start beyond
        # it. DPM-Solver++'s grid of that kind has one step more, which is left out.
        late = values["sample.spacing"] == "leading"
        most = steps - late - (late and values["sample.sampler"] in _SKIPPING)
        yield (
            values["sample.num_steps"] > most,
            f"sample.num_steps = {values['sample.num_steps']} must be at most {most} with "
            f"sample.spacing = {values['sample.spacing']!r}",
        )
        for path, default in _OF_FLOWS.items():
            yield (
                values[path] != default,
                f"{path} cannot apply to schedule.process = 'variance_preserving'; set it back to {default!r}",
            )
        if values["schedule.zero_terminal_snr"]:
            yield from _zero_terminal_snr(values)
        count = values["sample.num_steps"]
        yield (
            values["sample.sampler"] == "ddim"
            and values["sample.spacing"] == "trailing"
            and steps % count > steps / 20,
            f"sample.num_steps = {count} leaves a rest of {steps % count} of {steps} timesteps, by which DDIM, "
            f"counting back in whole strides, drifts off its grid; use a number that divides {steps}, or "
            "sample.sampler = 'euler'",
        )
        yield (
            values["noise.kind"] == "adjusted" and values["sample.spacing"] == "leading",
            "noise.kind = 'adjusted' needs sample.spacing = 'trailing': its shift is that of the last timestep, where "
            "leading spacing does not begin",
        )
        yield (
            values["noise.kind"] == "adjusted" and values["noise.anneal"],
            "noise.anneal cannot apply to noise.kind = 'adjusted', whose sampler has a table of the means for one "
            "strength; use noise.kind = 'offset'",
        )


def _zero_terminal_snr(values: Mapping[str, Any]) -> Iterator[tuple[object, str]]:
    yield (
        values["schedule.prediction_type"] == "epsilon",
        "schedule.zero_terminal_snr needs schedule.prediction_type = 'v_prediction': the last timestep's noise is its "
        "input, so that predicting ε says nothing of the picture",
    )
    yield (
        values["sample.spacing"] == "leading",
        "schedule.zero_terminal_snr needs sample.spacing = 'trailing': leading spacing never visits the last timestep",
    )
    yield (
        values["loss.min_snr_gamma"] > 0,
        "loss.min_snr_gamma gives the timesteps near a zero SNR no weight, and they decide on the brightness; set it "
        "to 0 or schedule.zero_terminal_snr to False",
    )
    yield (
        values["sample.sampler"] == "heun",
        "sample.sampler = 'heun' divides by the signal, of which schedule.zero_terminal_snr leaves none at the last "
        "timestep; use euler, dpmpp_2m or unipc",
    )
    yield (
        values["noise.kind"] == "adjusted",
        "noise.kind = 'adjusted' has no meaning with schedule.zero_terminal_snr: ψ_t = √(SNR_T / SNR_t) would be 0",
    )
    yield (
        values["noise.calibration"] and not values["noise.adaptive_scale"],
        "noise.calibration cannot apply with schedule.zero_terminal_snr: the terminal SNR is 0 already, and no offset "
        "is needed; leave it out",
    )


def variance_preserving(
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    prediction_type: PredictionType,
    zero_terminal_snr: bool = False,
) -> VariancePreserving:
    """Scaled-linear β from `beta_start` to `beta_end`, computed in float64 and rounded once.

    Args:
        zero_terminal_snr: shift and scale `√ᾱ` such that its last value is 0 and its first one stays.
    """
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64) ** 2
    signal = np.sqrt(np.cumprod(1.0 - betas))
    if zero_terminal_snr:
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    kept = (signal**2).astype(np.float32)
    return VariancePreserving(kept, prediction_type, (beta_start, beta_end), zero_terminal_snr)


def timestep_grid(num_train_timesteps: int, num_steps: int, spacing: str, sampler: str) -> Int[np.ndarray, " n"]:
    """The timesteps visited, from noisy to clean, as PyTorch diffusers' schedulers choose them.

    Args:
        spacing: "trailing" begins at the last timestep, T - 1; "leading" is Stable Diffusion's default, with the
            offset of one step that its scheduler has (`steps_offset=1`), and never visits the noisiest timesteps.
    """
    if spacing == "trailing":
        grid = np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)
        return np.round(grid[:num_steps]).astype(np.int32) - 1  # for some n, such as 61 of 1,000, rounding adds one
    skipped = int(sampler in _SKIPPING)  # which leaves out the grid's cleanest step
    whole_stride = num_train_timesteps // (num_steps + skipped)
    return ((np.arange(num_steps)[::-1] + skipped) * whole_stride + 1).astype(np.int32)


# The PyTorch scheduler of each of our samplers, and what makes it follow the same table of coefficients.
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
}


def single_file_markers(scheduler: Mapping[str, Any]) -> list[str]:
    """The names of the empty tensors by which a single file of SDXL says that it predicts v, and from no signal."""
    if scheduler.get("prediction_type") != "v_prediction":
        return []
    return ["v_pred", *(["ztsnr"] if scheduler.get("rescale_betas_zero_snr") else [])]


def latent_side(prediction_type: str) -> int:
    """The side of the latents that Stable Diffusion 2's two models were made for, which differ in what they predict."""
    return 96 if prediction_type == "v_prediction" else 64
