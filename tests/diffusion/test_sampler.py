"""Each sampler follows PyTorch diffusers' scheduler of that name, step for step and with the same injected noise."""

import importlib
from collections.abc import Mapping
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from offsetjax.config import default_config, validate
from offsetjax.diffusion.sampler import ANCESTRAL, NAMES, Name, coefficients, guided, solve
from offsetjax.diffusion.variance_preserving import VariancePreserving, timestep_grid, variance_preserving
from offsetjax.errors import UserError
from offsetjax.formats.diffusers import scheduler_config

SPACINGS: tuple[str, ...] = ("trailing", "leading")
PREDICTION_TYPES = ("epsilon", "v_prediction")
SHAPE = (2, 4, 6, 6)

# Name of the class, module, and what makes it the sampler of that name.
COUNTERPARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", "ddim", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", "ddpm", {"clip_sample": False, "variance_type": "fixed_small"}),
    "euler": ("EulerDiscreteScheduler", "euler_discrete", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", "euler_ancestral_discrete", {}),
    "dpmpp_2m": (
        "DPMSolverMultistepScheduler",
        "dpmsolver_multistep",
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    "heun": ("HeunDiscreteScheduler", "heun_discrete", {}),
    "unipc": ("UniPCMultistepScheduler", "unipc_multistep", {"solver_order": 2, "solver_type": "bh2"}),
}


def torch_scheduler(name: str, prediction_type: str, spacing: str, **settings: Any) -> Any:
    kind, _, own = COUNTERPARTS[name]
    return getattr(diffusers, kind)(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        prediction_type=prediction_type, timestep_spacing=spacing, **own, **settings,
    )  # fmt: skip


class Problem:
    """A denoiser that mixes channels and drifts with time, for both sides; a start and injected noise."""

    def __init__(self, num_steps: int):
        generator = np.random.default_rng(num_steps)
        self.mix = (0.4 * generator.standard_normal((4, 4))).astype(np.float32)
        self.drift = generator.standard_normal((4, 1, 1)).astype(np.float32)
        self.start = generator.standard_normal(SHAPE).astype(np.float32)
        self.injected = generator.standard_normal((num_steps, *SHAPE)).astype(np.float32)
        self.num_steps = num_steps

    def theirs(self, name: str, scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
        """All `x_t`, the start and the end included, in coordinates of unit variance."""
        scheduler.set_timesteps(self.num_steps)
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{COUNTERPARTS[name][1]}")
        sample = torch.from_numpy(self.start) * scheduler.init_noise_sigma
        path = []
        for number, timestep in enumerate(scheduler.timesteps):
            noisy = scheduler.scale_model_input(sample, timestep)  # Euler's x/√ᾱ → x
            path.append(noisy.numpy())
            prediction = torch.einsum("oc,bchw->bohw", torch.from_numpy(self.mix), noisy)
            prediction = prediction + torch.from_numpy(self.drift) * timestep / 1000
            if name in ANCESTRAL:
                drawn = torch.from_numpy(self.injected[number])
                monkeypatch.setattr(module, "randn_tensor", lambda *_, drawn=drawn, **__: drawn)
            sample = scheduler.step(prediction, timestep, sample).prev_sample
        return [*path, sample.numpy()]

    def ours(self, name: Name, spacing: str, schedule: Mapping[str, Any]) -> list[np.ndarray]:
        process = variance_preserving(**schedule)
        path = []

        def denoiser(noisy: jax.Array, timestep: jax.Array) -> jax.Array:
            path.append(np.asarray(noisy))
            return jnp.einsum("oc,bchw->bohw", self.mix, noisy) + self.drift * timestep / 1000

        def inject(index: jax.Array) -> jax.Array:
            return jnp.asarray(self.injected[int(index)])

        table = coefficients(name, process.grid(name, self.num_steps, spacing))
        with jax.disable_jit():  # the scan is then a loop, in which the values can be seen
            end = solve(denoiser, process, table, jnp.asarray(self.start), inject if name in ANCESTRAL else None)
        return [*path, np.asarray(end)]


def schedule_of(prediction_type: str, zero_terminal_snr: bool = False) -> dict[str, Any]:
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": prediction_type,
        "zero_terminal_snr": zero_terminal_snr,
    }


def farthest(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference of a step, relative to that step's largest value."""
    assert len(ours) == len(theirs)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_the_time_steps_are_those_of_diffusers(name: Name, spacing: str) -> None:
    scheduler = torch_scheduler(name, "epsilon", spacing)
    for num_steps in (*range(1, 61), 99, 250, 333, 500, 750):
        scheduler.set_timesteps(num_steps)
        grid = timestep_grid(1000, num_steps, spacing, name)
        theirs = scheduler.timesteps[::2] if name == "heun" else scheduler.timesteps  # it visits most twice
        np.testing.assert_array_equal(grid, theirs)
        table = coefficients(name, variance_preserving(**schedule_of("epsilon")).grid(name, num_steps, spacing))
        visited = np.append(grid[:1], np.repeat(grid[1:], 2)) if name == "heun" else grid
        np.testing.assert_array_equal(table.timesteps, visited)


# At 61 steps, and at 99 other numbers up to 1000, diffusers visits one more: time step -1, which is the noisiest.
@pytest.mark.parametrize("num_train_timesteps", [1000, 100])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_steps_is_kept_and_goes_down_within_the_schedule(
    name: Name, spacing: str, num_train_timesteps: int
) -> None:
    most = num_train_timesteps - (0 if spacing == "trailing" else 2 if name in ("dpmpp_2m", "unipc") else 1)
    for num_steps in range(1, most + 1):
        grid = timestep_grid(num_train_timesteps, num_steps, spacing, name)
        assert len(grid) == num_steps, num_steps
        assert grid[-1] >= 0 and grid[0] < num_train_timesteps
        assert (np.diff(grid) < 0).all()


@pytest.mark.parametrize(
    ("name", "spacing", "most"), [("ddim", "trailing", 1000), ("ddim", "leading", 999), ("dpmpp_2m", "leading", 998)]
)
def test_more_steps_than_the_schedule_has_are_refused(name: Name, spacing: str, most: int) -> None:
    config = default_config()
    config.sample.update(sampler=name, spacing=spacing, num_steps=most)
    validate(config)
    grid = timestep_grid(1000, most, spacing, name)
    assert grid[0] == 999 and grid[-1] >= 0
    for too_many in (most + 1, most + 2):
        config.sample.num_steps = too_many
        with pytest.raises(UserError, match=r"sample\.num_steps = \d+ must be at most"):
            validate(config)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 10, 25, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_that_of_diffusers(
    name: Name, prediction_type: str, spacing: str, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(num_steps)
    theirs = problem.theirs(name, torch_scheduler(name, prediction_type, spacing), monkeypatch)
    ours = problem.ours(name, spacing, schedule_of(prediction_type))
    assert len(ours) == (2 * num_steps if name == "heun" else num_steps + 1)
    assert farthest(ours, theirs) < 2e-5  # of float32; the coefficients alone are 0.00001 apart in places


@pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 50])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "heun"])
def test_every_step_from_a_zero_snr_is_that_of_diffusers(
    name: Name, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(num_steps)
    scheduler = torch_scheduler(name, "v_prediction", "trailing", rescale_betas_zero_snr=True)
    theirs = problem.theirs(name, scheduler, monkeypatch)
    ours = problem.ours(name, "trailing", schedule_of("v_prediction", zero_terminal_snr=True))
    if name in ("ddim", "ddpm"):
        assert farthest(ours, theirs) < 2e-5
        return
    # PyTorch's Euler and DPM-Solver++ need a last √ᾱ that is not 0, and set it to 2**-12: the first step then depends
    # on x_T and on x̂0 by as much more; an ancestral step, by 2**-12 / √ᾱ_s.
    kept = variance_preserving(**schedule_of("v_prediction", zero_terminal_snr=True)).alphas_cumprod
    after = np.sqrt(kept[scheduler.timesteps[1].int()]) if num_steps > 1 else 1.0
    bound = 2.0**-12 * (1 / after if name == "euler_ancestral" else 1.0)
    assert farthest(ours, theirs) < 4 * bound
    # With the same last value, the same steps, but for rounding: Euler's coordinates begin 4096 times as large.
    kept[-1] = 2.0**-24
    clamped = VariancePreserving(kept, "v_prediction")
    monkeypatch.setattr("tests.diffusion.test_sampler.variance_preserving", lambda **_: clamped)
    again = problem.ours(name, "trailing", {})
    assert farthest(again, theirs) < (2 * 4096 * 2.0**-24 if name.startswith("euler") else 1e-4)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_the_scheduler_that_an_export_writes_follows_our_table(
    name: Name, spacing: str, zero_terminal_snr: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if zero_terminal_snr and (spacing == "leading" or name == "heun"):
        pytest.skip("no config has them both")
    problem = Problem(10)
    schedule = schedule_of("v_prediction", zero_terminal_snr)
    written = scheduler_config(variance_preserving(**schedule).scheduler(name, spacing))
    scheduler = getattr(diffusers, written["_class_name"]).from_config(written)
    assert type(scheduler).__name__ == COUNTERPARTS[name][0]
    unknown = set(written) - set(scheduler.config) - {"_class_name", "_diffusers_version"}
    assert not unknown, "it holds settings that the class does not have"
    theirs = problem.theirs(name, scheduler, monkeypatch)
    is_clamped = zero_terminal_snr and name not in ("ddim", "ddpm")
    assert farthest(problem.ours(name, spacing, schedule), theirs) < (0.02 if is_clamped else 2e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_guidance_is_rescaled_as_in_diffusers(scale: float, rescale: float) -> None:
    generator = np.random.default_rng(1)
    unconditional, conditional = generator.standard_normal((2, 3, 4, 6, 5)).astype(np.float32)
    conditional[1] *= 3.0  # each example has a deviation of its own
    plain = torch.from_numpy(unconditional) + scale * torch.from_numpy(conditional - unconditional)
    theirs = rescale_noise_cfg(plain, torch.from_numpy(conditional), guidance_rescale=rescale)
    ours = guided(jnp.asarray(unconditional), jnp.asarray(conditional), scale, rescale)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    if rescale == 1.0:
        np.testing.assert_allclose(np.std(ours, (1, 2, 3)), conditional.std((1, 2, 3)), rtol=1e-5)
