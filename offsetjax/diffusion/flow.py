r"""Flow matching over a straight path (rectified flow), with a continuous timestep t from 0 to 1.

    x_t = (1-t) x0 + t n_t           target  dx_t/dt = n_t - x0 + t dn_t/dt           the network receives 1000 t

Nothing of the picture is left at t = 1, so that sampling which starts from the noise of training is exact. A mode of
data of power D is as strong as its noise, of power P, at `t* = 1 / (1 + √(P/D))`: noise of power P is for its mode
alone what a shift by √P is for all, `(1-t')/t' = (1-t) / (√P t)`. Noise that changes with time grows as `ψ_t = t`.

A shift a multiplies σ/α = t/(1-t) at every timestep of a sampler's grid and of a training density:
`t' = a t / (1 + (a-1) t)`. It is fixed, or `a √(m/n)` for m latent pixels where it is a for n, or `exp(μ)` with μ
linear in the number of tokens, a patch of 2x2 latent pixels each (FLUX: 0.5 at 256, 1.15 at 4,096).

Sources: Y. Lipman et al., arXiv 2210.02747; X. Liu et al., arXiv 2209.03003; P. Esser et al., arXiv 2403.03206 (SD 3);
FLUX.1's code for the shift by tokens.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float, Int, Key

from offsetjax.diffusion.density import Density, shifted
from offsetjax.diffusion.mapped_flow import MappedFlow
from offsetjax.diffusion.mapped_flow import rules as mapped_rules
from offsetjax.diffusion.process import Grid, Process
from offsetjax.diffusion.variance_preserving import VariancePreserving
from offsetjax.errors import UserError
from offsetjax.json_text import parse_object

ShiftRule = Literal["fixed", "resolution", "tokens"]

# What the header of a single file says of a flow, and the name that kohya's scripts have for its shift.
METADATA_NAME, SHIFT_METADATA = "flow", "ss_discrete_flow_shift"
# Our own, whole, for there is no common name for a rule: the fields of `config.schedule` in JSON.
SCHEDULE_METADATA = "offsetjax.schedule"
SHIFTS = ("shift", "shift_rule", "shift_resolution")
_TOLD = 1000
# What only the variance-preserving process reads.
_OF_BETAS = {"prediction_type": "epsilon", "beta_start": 0.00085, "beta_end": 0.012}
# FLUX's rule, by the names of a scheduler's JSON.
_BY_TOKENS = {
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}

_EPSILON = 1e-6  # UniPC of PyTorch diffusers takes this much from a σ of 1, whose λ is infinite


@dataclass(frozen=True)
class Flow:
    """The process.

    Attributes:
        shift: a, for latents of `reference_pixels` where it goes by the resolution; not read where it goes by tokens.
        reference_pixels: n.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    shift_rule: ShiftRule = "fixed"
    reference_pixels: float = 0.0

    includes_rate = True
    predicts = "the velocity n - x0 of a flow"
    last_timestep = 1.0

    @classmethod
    def make(cls, schedule: Mapping[str, Any], downscale: int) -> Process:
        """The process of `config.schedule`: mapped, where the network keeps to its own terms."""
        flow = cls(
            schedule["num_train_timesteps"],
            schedule["shift"],
            schedule["shift_rule"],
            (schedule["shift_resolution"] / downscale) ** 2,
        )
        if schedule.get("conversion", "plain") == "plain":  # what was stored by an earlier version does not say
            return flow
        network = VariancePreserving.make(schedule, downscale)
        return MappedFlow(flow, network, schedule["prediction_type"] == "v_prediction")

    def shift_at(self, pixels: int) -> float:
        match self.shift_rule:
            case "resolution":
                return self.shift * math.sqrt(pixels / self.reference_pixels)
            case "tokens":
                slope = (1.15 - 0.5) / (4096 - 256)
                return math.exp(0.5 + slope * (pixels / 4 - 256))
        return self.shift

    def scales(self, timestep: Any) -> tuple[Any, Any]:
        return 1.0 - timestep, timestep

    def snr(self, timestep: Any) -> Any:
        return ((1.0 - timestep) / timestep) ** 2

    def growth(self, timestep: Any) -> tuple[Any, float]:
        return timestep, 1.0

    def draw_timestep(
        self, key: Key[Array, ""], density: Density, position: Int[Array, ""], pixels: int
    ) -> Float[Array, ""]:
        return density.draw(key, position, self.shift_at(pixels))

    def timestep_at(self, number: Any) -> Any:
        return number / self.num_train_timesteps

    def network_timestep(self, timestep: Any) -> Any:
        return timestep * self.num_train_timesteps

    def target(
        self,
        latent: Float[Array, "*s"],
        noise: Float[Array, "*s"],
        rate: float | Float[Array, "*#s"],
        timestep: Float[Array, ""],
    ) -> Float[Array, "*s"]:
        return noise - latent + timestep * rate

    def to_latent_and_noise(
        self, noisy: Float[Array, "*s"], prediction: Float[Array, "*s"], timestep: Float[Array, ""]
    ) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
        """`x_t - t v` and `x_t + (1-t) v`.

        Under noise that changes with time the first is not the best guess of x0, but what takes any deterministic
        sampler along v.
        """
        return noisy - timestep * prediction, noisy + (1.0 - timestep) * prediction

    def error_gain(self, timestep: Float[Array, ""]) -> Float[Array, ""]:
        return 1.0 / timestep**2

    def weight(self, timestep: Float[Array, ""]) -> float:
        return 1.0

    def grid(self, sampler: str, num_steps: int, spacing: str, shift: float) -> Grid:
        """One shift of a straight line from 1 to 0; of DPM-Solver++ and UniPC, from where PyTorch's begin."""
        count = self.num_train_timesteps
        line = np.linspace(1.0, 0.0, num_steps + 1)
        if sampler in _MULTISTEP:
            # Kept operation by operation: the network's timestep is cut to a whole number.
            line = np.flip(1.0 - np.linspace(1.0, 1.0 / count, num_steps + 1))
        if sampler == "unipc":
            line = np.linspace(1.0, 1.0 / count, num_steps + 1)
        sigma = np.minimum(shifted(line, shift), 1.0)[:num_steps]  # for some shifts rounding leads beyond all noise
        if sampler == "unipc" and abs(sigma[0] - 1.0) < _EPSILON:
            sigma[0] -= _EPSILON
        after = np.append(sigma[1:], 0.0)
        scaled = sigma * count
        return Grid(
            sigma,
            network_timesteps=np.trunc(scaled) if sampler in (*_MULTISTEP, "unipc") else scaled,
            timesteps_after=after,
            alpha=1.0 - sigma,
            sigma=sigma,
            alpha_after=1.0 - after,
            sigma_after=after,
            log_snr=np.log(np.maximum(1.0 - sigma, 1e-9) / sigma),
            scale=np.ones(num_steps),
        )

    def scheduler(self, sampler: str, spacing: str, shift: float) -> dict[str, Any]:
        name, settings = _SCHEDULERS[sampler]
        return {
            "_class_name": name,
            "num_train_timesteps": self.num_train_timesteps,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": shift,
            "final_sigmas_type": "zero",
            **settings,
        }

    @property
    def exported(self) -> "Flow":
        return self

    def exported_sampler(self, sampler: Any) -> Any:
        return _MADE_OF.get(sampler, sampler)

    def advice(self, shift: float) -> str:
        return (
            f"This is a rectified flow, its timestep 1000 t, with a shift of {shift:.4g}. No key of a file says so: in "
            "ComfyUI put the node ModelSamplingSD3 with that shift behind the checkpoint's loader."
        )

    def metadata(self) -> dict[str, str]:
        return {"modelspec.prediction_type": METADATA_NAME, SHIFT_METADATA: repr(self.shift)}

    @staticmethod
    def recognise(scheduler: Mapping[str, Any]) -> dict[str, Any] | None:
        """A flow has flow sigmas, or a scheduler of flow matching; the shift is stored by two names, or as a rule.

        Raises:
            UserError: it is a flow of a kind that is not known here.
        """
        is_flow = scheduler.get("prediction_type") == "flow_prediction" or scheduler.get("use_flow_sigmas")
        if not is_flow and not str(scheduler.get("_class_name", "")).startswith("FlowMatch"):
            return None
        predicts = scheduler.get("prediction_type", "flow_prediction")
        wrong = {"prediction_type": predicts} if predicts != "flow_prediction" else {}
        wrong |= {"invert_sigmas": True} if scheduler.get("invert_sigmas") else {}
        said = {key: scheduler[key] for key in ("num_train_timesteps",) if key in scheduler}
        if scheduler.get("use_dynamic_shifting"):
            differing = {key: scheduler[key] for key, usual in _BY_TOKENS.items() if scheduler.get(key, usual) != usual}
            wrong |= differing
            said |= {"shift_rule": "tokens"}
        elif (shift := scheduler.get("flow_shift", scheduler.get("shift"))) is not None:
            said |= {"shift": shift}
        for key, value in wrong.items():
            raise UserError(
                f"model.pretrained: the scheduler of a flow has {key} = {value!r}, which is not supported; give "
                "a model whose scheduler has a fixed shift, or FLUX's by tokens"
            )
        return said

    @staticmethod
    def rules(values: Mapping[str, Any]) -> Iterator[tuple[object, str]]:
        is_mapped = values["schedule.conversion"] == "mapped"
        if is_mapped:
            yield from mapped_rules(values)
        yield (
            values["schedule.zero_terminal_snr"] and not is_mapped,
            "schedule.zero_terminal_snr cannot apply to schedule.process = 'flow', whose terminal SNR is 0; leave it "
            "out",
        )
        yield (
            values["sample.spacing"] != "trailing",
            f"sample.spacing = {values['sample.spacing']!r} cannot apply to schedule.process = 'flow', whose samplers "
            "begin at t = 1; set sample.shift, or leave it out",
        )
        yield (
            values["schedule.shift_rule"] == "tokens" and values["schedule.shift"] != 1,
            "schedule.shift cannot apply with schedule.shift_rule = 'tokens', which says what it is; leave it out",
        )
        yield (
            values["schedule.shift_rule"] != "resolution" and values["schedule.shift_resolution"],
            "schedule.shift_resolution cannot apply without schedule.shift_rule = 'resolution'; leave it out",
        )
        yield (
            values["schedule.shift_rule"] == "resolution" and not values["schedule.shift_resolution"],
            "schedule.shift_rule = 'resolution' needs schedule.shift_resolution, the size in pixels that "
            "schedule.shift is for",
        )
        yield (
            values["noise.kind"] == "adjusted" and values["sample.sampler"] in ("ddpm", "euler_ancestral"),
            f"sample.sampler = {values['sample.sampler']!r} cannot apply to noise.kind = 'adjusted' with "
            "schedule.process = 'flow': the velocity does not say what x0 is while the noise changes; use euler, heun, "
            "dpmpp_2m or unipc",
        )
        for field in ("prediction_type", "beta_start", "beta_end"):
            path = f"schedule.{field}"
            yield (
                values[path] != _OF_BETAS[field] and not is_mapped,
                f"{path} cannot apply to schedule.process = 'flow', which knows no betas and predicts the velocity "
                "n - x0; leave it out",
            )
        yield (
            values["schedule.num_train_timesteps"] != _TOLD and not is_mapped,
            f"schedule.num_train_timesteps cannot apply to schedule.process = 'flow', whose network is told {_TOLD} t; "
            "leave it out",
        )
        yield (
            values["noise.calibration"] and not values["noise.adaptive_scale"],
            "noise.calibration cannot apply to schedule.process = 'flow': its terminal SNR is 0 with any noise; set "
            "noise.offset_strength",
        )


_MULTISTEP = ("ddim", "ddpm", "dpmpp_2m")  # which are DPM-Solver++ of order 1, with noise injected or not, and 2

# The PyTorch scheduler of each of our samplers that the pipelines of Stable Diffusion run, which scale their start by
# `init_noise_sigma`: FlowMatchEulerDiscreteScheduler has none. A first-order step is Euler's, on another grid.
_DPM = "DPMSolverMultistepScheduler"
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": (_DPM, {"algorithm_type": "dpmsolver++", "solver_order": 1}),
    "ddpm": (_DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    "euler_ancestral": (_DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    "euler": (_DPM, {"algorithm_type": "dpmsolver++", "solver_order": 1}),
    "dpmpp_2m": (_DPM, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "heun": (_DPM, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
}

# Those have other grids than ours of the same name: the samplers of ours whose steps they make.
_MADE_OF = {"euler": "ddim", "heun": "dpmpp_2m", "euler_ancestral": "ddpm"}


def shift_metadata(schedule: Mapping[str, Any], drawn: float) -> dict[str, str]:
    """What a header says of a flow's shifts: that of drawing at the training's size, and the training's own rule."""
    own = {key: schedule[key] for key in SHIFTS}
    return {SHIFT_METADATA: repr(drawn), SCHEDULE_METADATA: json.dumps(own)}


def stored_shifts(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `config.schedule` that `shift_metadata` has written; none where a header has none or others."""
    try:
        own = parse_object(metadata.get(SCHEDULE_METADATA, "{}"))
    except ValueError:
        return {}
    found = {key: own[key] for key in SHIFTS if key in own}
    is_whole = len(found) == len(SHIFTS) and type(found["shift"]) is float and 0.0 < found["shift"] < math.inf
    is_known = is_whole and found["shift_rule"] in ("fixed", "resolution", "tokens")
    is_sized = is_known and type(found["shift_resolution"]) is int and 0 <= found["shift_resolution"] <= 100_000
    return found if is_sized and (found["shift_rule"] == "resolution") == bool(found["shift_resolution"]) else {}


def stored_scheduler(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The scheduler of a single file whose header says that it is a flow; None: it does not say so."""
    if metadata.get("modelspec.prediction_type") != METADATA_NAME:
        return None
    try:
        shift = float(metadata.get(SHIFT_METADATA, "1.0"))
    except ValueError:
        shift = 1.0
    return Flow().scheduler("dpmpp_2m", "trailing", shift if 0.0 < shift < math.inf else 1.0)
