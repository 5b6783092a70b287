"""The ComfyUI nodes, without ComfyUI: their noise is ours for the same ε and ξ, whatever kind and size."""

import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch

from offsetjax.errors import UserError
from offsetjax.exporting.comfyui import comfyui_node
from offsetjax.exporting.export import export
from offsetjax.exporting.model_card import model_card
from offsetjax.models.pipeline import build
from tests import tiny
from tests.exporting.test_model_card import NOISES

COUNT = 6
OTHERS: dict[str, dict[str, Any]] = {
    "interpolated": {
        "noise__kind": "spectral",
        "noise__offset_strength": 0.0,
        "noise__spectrum": ("interp(f, (0.0, 0.1, 0.5), (9.0, 4.0, 1.0))", "pi / 2", "maximum(f * N, 1) ** -1",
                            "where((f > 0.2), 1, minimum(2, 3 - f)) + abs(-sqrt(f)) + log(2)"),
    },
    "flow": {"schedule__process": "flow", "noise__offset_strength": 0.3, "noise__reference_resolution": 64,
             "schedule__shift_rule": "tokens"},
    "by resolution": {"schedule__process": "flow", "noise__offset_strength": 0.3, "noise__reference_resolution": 64,
                      "schedule__shift_rule": "resolution", "schedule__shift_resolution": 64,
                      "noise__random_strength": True, "noise__kind": "pyramid", "noise__pyramid_discount": 0.5,
                      "noise__pyramid_levels": 5},
}  # fmt: skip


def nodes_of(title: str = 'A "model" \\ ü', **changes: Any) -> dict[str, Any]:
    config = tiny.tiny_config(**changes)
    names: dict[str, Any] = {}
    exec(compile(comfyui_node(build(config), config.data.resolution, title, 0), "node.py", "exec"), names)
    return names


@pytest.mark.parametrize("size", [(8, 8), (16, 12)])
@pytest.mark.parametrize("name", [*NOISES, *OTHERS])
def test_the_nodes_noise_is_ours(name: str, size: tuple[int, int]) -> None:
    changes = {**NOISES, **OTHERS}[name]
    config = tiny.tiny_config(**changes)
    noise, shape = build(config).noising.noise(), (4, *size)
    keys = jax.random.split(jax.random.key(3), COUNT)
    ours = jax.vmap(lambda key: noise.start(key, shape))(keys)

    def draws(key: jax.Array) -> tuple[jax.Array, ...]:
        """As `Noise.start` draws."""
        pixel_key, offset_key = jax.random.split(key)
        white, xi = jax.random.normal(pixel_key, shape), jax.random.normal(offset_key, (4, 1, 1))
        uniform = jax.random.uniform(jax.random.fold_in(key, 2))[None, None, None]
        has_offset = jax.random.bernoulli(jax.random.fold_in(key, 3), noise.probability)[None, None, None]
        return white, xi, uniform, has_offset, jax.random.normal(jax.random.fold_in(key, 4), (4, 1, 1))

    drawn = [torch.tensor(np.asarray(each)) for each in jax.vmap(draws)(keys)]
    node = nodes_of(**changes)
    theirs = node["matched_noise"](node["PARAMETERS"], *drawn)
    assert theirs.dtype == torch.float32
    np.testing.assert_allclose(theirs, ours, rtol=2e-5, atol=2e-5)
    if name != "plain":
        assert np.abs(np.asarray(ours) - drawn[0].numpy()).max() > 0.01


def test_a_noise_of_a_seed() -> None:
    node = nodes_of(noise__offset_strength=0.5)
    assert list(node["NODE_CLASS_MAPPINGS"]) == list(node["NODE_DISPLAY_NAME_MAPPINGS"])
    (noise,) = node["NoiseNode"]().make(7)
    assert noise.seed == 7 and "noise_seed" in node["NoiseNode"].INPUT_TYPES()["required"]
    batch = noise.generate_noise({"samples": torch.zeros(2000, 4, 8, 8)})
    assert batch.shape == (2000, 4, 8, 8) and torch.equal(batch, noise.generate_noise({"samples": batch}))
    assert batch.mean((2, 3)).var() == pytest.approx(1 / 64 + 0.25, rel=0.06)
    picked = noise.generate_noise({"samples": torch.zeros(2, 4, 8, 8), "batch_index": [5, 3]})
    assert torch.equal(picked, batch[[5, 3]])
    with pytest.raises(ValueError, match="latents of 4 channels"):
        noise.generate_noise({"samples": torch.zeros(1, 16, 8, 8)})


def model_of(scaling: Any, sigma: float) -> Any:
    """What the latent node asks a MODEL for."""
    sampling = SimpleNamespace(sigma_max=torch.tensor(sigma), noise_scaling=scaling)
    latent_format = SimpleNamespace(process_out=lambda latent: latent / 0.18215)
    return SimpleNamespace(get_model_object={"model_sampling": sampling, "latent_format": latent_format}.get)


def test_a_latent_is_scaled_as_the_sampler_would_scale_the_noise() -> None:
    node = nodes_of(noise__offset_strength=0.5)
    empty = {"samples": torch.zeros(3, 4, 8, 8), "other": 1}
    model = model_of(lambda sigma, noise, latent, largest: noise * (1 + sigma**2) ** 0.5 + latent, 14.6)
    (latent,) = node["LatentNode"]().make(model, empty, 7)
    noise = node["MatchedNoise"](7).generate_noise(empty)
    torch.testing.assert_close(latent["samples"] * 0.18215, noise * (1 + 14.6**2) ** 0.5)
    assert latent["other"] == 1 and not empty["samples"].any()
    for sigma in (1.0, 1.0 - 2**-24, 1.0 + 2**-23):  # as a shift of 1 may be rounded
        flow = model_of(lambda sigma, noise, latent, largest: sigma * noise + (1 - sigma) * latent, sigma)
        with pytest.raises(ValueError, match="SamplerCustomAdvanced"):
            node["LatentNode"]().make(flow, empty, 7)


def test_it_is_exported(tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    workdir = tiny.trained_workdir(tmp_path_factory.getbasetemp())
    with pytest.raises(UserError, match=r"ends in \.py"):
        export(workdir, tmp_path / "node.safetensors", form="comfyui_node")
    with pytest.raises(UserError, match="--dtype cannot apply"):
        export(workdir, tmp_path / "node.py", form="comfyui_node", dtype="bfloat16")
    export(workdir, tmp_path / "node.py", form="comfyui_node")
    names: dict[str, Any] = {}
    exec((tmp_path / "node.py").read_text(), names)
    assert names["PARAMETERS"]["strengths"] == [0.1] and names["PARAMETERS"]["title"] == "node"
    assert [path.name for path in tmp_path.iterdir()] == ["node.py"]
    config = tiny.tiny_config()
    assert "--format=comfyui_node" in model_card(build(config), config.sample, config.data.resolution, 1)
