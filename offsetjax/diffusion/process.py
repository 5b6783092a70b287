r"""What a diffusion process is to the rest of the package: how latents are noised, and what a network predicts.

    x_t = α_t x0 + σ_t n_t,    n_t the noise of `noise.py`, t the process's own timestep: a whole number, or a float

One file each implements it, and nothing outside of this folder depends on which it is: `variance_preserving.py` (DDPM:
ε, v, zero terminal SNR) and `flow.py` (flow matching). `make_process` makes the one that `schedule.process` names, and
`PROCESSES` takes others'.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from offsetjax.diffusion.density import Density
from offsetjax.registry import Registry

Timestep = Int[Array, ""] | Float[Array, ""]
Times = Int[np.ndarray, " n"] | Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Grid:
    """The n timesteps that a sampler visits, from noisy to clean, and where each of its steps goes; in float64.

    Attributes:
        timesteps: the process's own.
        network_timesteps: what the network receives at each of them.
        timesteps_after: where each step ends; where that is beyond all noise, `sigma_after` is 0 and this any timestep.
        log_snr: `λ = log(α/σ)` at each timestep, finite.
        scale: what `x_t` is divided by where `x_t/scale = x0 + …` goes straight from x0 to the noise: in what Heun's
            method takes its means.
        start: what the noise that sampling starts from is multiplied by.
    """

    timesteps: Times
    network_timesteps: Times
    timesteps_after: Times
    alpha: Float[np.ndarray, " n"]
    sigma: Float[np.ndarray, " n"]
    alpha_after: Float[np.ndarray, " n"]
    sigma_after: Float[np.ndarray, " n"]
    log_snr: Float[np.ndarray, " n"]
    scale: Float[np.ndarray, " n"]
    start: float = 1.0


@runtime_checkable
class Process(Protocol):
    """A process with its parameterisation, for one example at a time: `jax.vmap` it.

    Methods of a timestep take a traced one, and give float32, or numpy's (an array of them, too), and give float64.
    """

    @property
    def num_train_timesteps(self) -> int:
        """How many timesteps configs number, of which a process of continuous time has any in between."""

    @property
    def last_timestep(self) -> Any:
        """The noisiest timestep, as a number; there ψ is 1."""

    @property
    def includes_rate(self) -> bool:
        """Whether the target has the derivative in time of noise that changes with time.

        Deterministic samplers then follow such noise as they are; otherwise the mean has a table of its own.
        """

    @property
    def predicts(self) -> str:
        """What the network predicts, for people: ε, v."""

    def scales(self, timestep: Any) -> tuple[Any, Any]:
        """`α_t` and `σ_t`."""

    def snr(self, timestep: Any) -> Any:
        """`α_t² / σ_t²`, the signal-to-noise ratio of a pixel under plain noise."""

    def growth(self, timestep: Any) -> tuple[Any, Any]:
        """`ψ_t`, the share of its shift that `adjusted` noise has, and its derivative in t, where the target has it."""

    def shift_at(self, pixels: int) -> float:
        """What σ/α is multiplied by at each share of the timesteps, for latents of that many pixels."""

    def draw_timestep(self, key: Key[Array, ""], density: Density, position: Int[Array, ""], pixels: int) -> Timestep:
        """A timestep of training, of an example at a place in the global batch, whose latent has so many pixels."""

    def timestep_at(self, number: Any) -> Any:
        """The process's own timestep at `number` of `num_train_timesteps`, by which configs name them."""

    def network_timestep(self, timestep: Timestep) -> Timestep:
        """What the network receives for a timestep."""

    def target(
        self,
        latent: Float[Array, "*s"],
        noise: Float[Array, "*s"],
        rate: float | Float[Array, "*#s"],
        timestep: Timestep,
    ) -> Float[Array, "*s"]:
        """What the network must predict for one example.

        Args:
            rate: the noise's derivative in time, `dn_t/dt`; 0 for noise that does not change.
        """

    def to_latent_and_noise(
        self, noisy: Float[Array, "*s"], prediction: Float[Array, "*s"], timestep: Timestep
    ) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
        """The estimates of `x0` and of `n` that a prediction at `x_t` stands for."""

    def error_gain(self, timestep: Timestep) -> Float[Array, ""]:
        """The squared error of the prediction that a squared error of 1 of x0 makes, at a given `x_t`."""

    def weight(self, timestep: Timestep) -> Any:
        """What a squared error of the prediction counts, where nothing else weighs it: 1 but for one that stands for
        another.
        """

    def grid(self, sampler: str, num_steps: int, spacing: str, shift: float) -> Grid:
        """The timesteps of a sampler of `sampler.NAMES`, as PyTorch diffusers' counterpart chooses them.

        Args:
            shift: of the grid; for a process without one, not read.
        """

    def scheduler(self, sampler: str, spacing: str, shift: float) -> dict[str, Any]:
        """`scheduler_config.json` of PyTorch diffusers' counterpart of a sampler: `_class_name` and its settings."""

    @property
    def exported(self) -> "Process":
        """The process by whose grids others' programs draw an export: itself, unless the network keeps to another's."""

    def advice(self, shift: float) -> str:
        """What a model's card says, besides the noise, to those who sample it elsewhere; "" for nothing.

        Args:
            shift: of the sampler's grid.
        """

    def exported_sampler(self, sampler: Any) -> Any:
        """Which sampler of ours makes the steps of the PyTorch scheduler that stands for this one in an export."""

    def metadata(self) -> dict[str, str]:
        """What the header of an exported file says of the process: `modelspec.*` and `ss_*`."""


@runtime_checkable
class ProcessType(Protocol):
    """What makes a process from a config: what `PROCESSES` holds."""

    def make(self, schedule: Mapping[str, Any], downscale: int) -> Process:
        """The process of `config.schedule`, whose fields have been checked; `downscale` as in `make_process`."""

    def recognise(self, scheduler: Mapping[str, Any]) -> dict[str, Any] | None:
        """The fields of `config.schedule` that a checkpoint's `scheduler_config.json` says; None: it is of another."""

    def rules(self, values: Mapping[str, Any]) -> Iterator[tuple[object, str]]:
        """Whether something in a config, by its fields' paths, does not go with this process, and what."""


PROCESSES: Registry[ProcessType] = Registry(
    "schedule.process",
    "offsetjax.processes",
    {
        "variance_preserving": "offsetjax.diffusion.variance_preserving:VariancePreserving",
        "flow": "offsetjax.diffusion.flow:Flow",
    },
)


def make_process(schedule: Mapping[str, Any], downscale: int = 8) -> Process:
    """The process of `config.schedule`.

    Args:
        downscale: pixels of a picture a latent pixel, on a side.

    Raises:
        UserError: `schedule.process` names none.
    """
    # A calibration of an earlier version does not name it.
    return PROCESSES[schedule.get("process", "variance_preserving")].make(schedule, downscale)


def unread_fields(schedule: Mapping[str, Any]) -> list[str]:
    """The fields of `config.schedule` that a process which others bring never asks for: they cannot apply to it.

    Of ours none: their rules say what cannot apply, and why.
    """
    if PROCESSES.is_own(schedule["process"]):
        return []
    asked = _Asked(schedule)
    make_process(asked)
    return sorted(schedule.keys() - asked.names - {"process"})


class _Asked(Mapping[str, Any]):
    """A mapping that remembers what it was asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values, self.names = values, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def recognised(scheduler: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of `config.schedule`, `process` first, that a checkpoint's `scheduler_config.json` says.

    None is for one that no process knows.
    """
    for name in reversed(PROCESSES.names):  # the first takes what says nothing else
        fields = PROCESSES[name].recognise(scheduler)
        if fields is not None:
            return {"process": name, **fields}
    return None


def add_noise(
    process: Process, latent: Float[Array, "*s"], noise: Float[Array, "*s"], timestep: Timestep
) -> Float[Array, "*s"]:
    """`x_t` of one example."""
    alpha, sigma = process.scales(timestep)
    return alpha * latent + sigma * noise


def mode_snr(
    power: Float[np.ndarray, "*#s"], noise_power: Float[np.ndarray, "*#s"], snr: float | Float[np.ndarray, "*#s"]
) -> Float[np.ndarray, "*s"]:
    """The signal-to-noise ratio of modes of the data's power `P` under noise of the power `S`, where a pixel has `snr`.

    At the last timestep it is the mode's terminal SNR. The three are broadcast. Noise of no power at all hides nothing:
    the ratio there is some 10³⁰.
    """
    return snr * power / np.maximum(noise_power, 1e-30)


def is_traced(timestep: Any) -> bool:
    """Whether a timestep is jax's, for which a process answers in float32."""
    return isinstance(timestep, jax.Array)
