"""Autoencoders of every kind give PyTorch's numbers; files of theirs come back bit for bit."""

import dataclasses
import pathlib
from collections.abc import Iterator

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import Array, PyTree

from offsetjax.models.kl_autoencoder import KLAutoencoder, packed, unpacked
from offsetjax.models.tiles import decode_in_tiles
from tests import tiny
from tests.models.judge import assert_files_come_back, assert_names_and_shapes, normal
from tests.torch_models import counterpart, gradient_errors, params_of, relative_error

SMALL = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 12),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "mid_block_add_attention": True,
}
STABLE_DIFFUSION = {**SMALL, "latent_channels": 4, "scaling_factor": 0.18215}
FLUX1 = {
    **SMALL,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD3 = {**FLUX1, "scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX2 = {**SMALL, "latent_channels": 8, "batch_norm_eps": 1e-4, "patch_size": (2, 2)}
KINDS = {
    "Stable Diffusion": KLAutoencoder(STABLE_DIFFUSION),
    "FLUX.1": KLAutoencoder(FLUX1),
    "SD 3": KLAutoencoder(SD3),
    "FLUX.2": KLAutoencoder(FLUX2, class_name="AutoencoderKLFlux2"),
    "no attention, another decoder": KLAutoencoder(
        {**FLUX2, "mid_block_add_attention": False, "decoder_block_out_channels": (8, 16), "layers_per_block": 2},
        class_name="AutoencoderKLFlux2",
    ),
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(pathlib.Path(tmp_path_factory.getbasetemp())):
        yield


def pytorchs(vae: KLAutoencoder) -> tuple[torch.nn.Module, PyTree]:
    """The PyTorch model with random weights and statistics, and its parameters as ours."""
    theirs = counterpart(vae)
    if vae.is_packed:
        with torch.no_grad():
            theirs.bn.running_mean.normal_(generator=torch.Generator().manual_seed(1))
            theirs.bn.running_var.uniform_(0.1, 3.0, generator=torch.Generator().manual_seed(2))
            theirs.bn.num_batches_tracked.fill_(12_345)
    return theirs, params_of(theirs, vae)


@pytest.mark.parametrize("name", KINDS)
def test_both_halves_and_their_gradients_are_pytorchs(name: str) -> None:
    vae = KINDS[name]
    theirs, params = pytorchs(vae)
    pixels, other = normal(2, 3, 20, 12), normal(2, 3, 12, 20).transpose(0, 1, 3, 2).copy()

    def loss(params: PyTree) -> tuple[Array, tuple[Array, ...]]:
        mean, log_variance = vae.encode(params, pixels)
        decoded = vae.decode(params, mean)
        return jnp.mean(jnp.square(decoded - other)) + jnp.mean(log_variance), (mean, log_variance, decoded)

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    posterior = theirs.encode(torch.from_numpy(pixels)).latent_dist
    decoded = theirs.decode(posterior.mean).sample
    (torch.nn.functional.mse_loss(decoded, torch.from_numpy(other)) + posterior.logvar.mean()).backward()

    for each, expected in zip(ours, (posterior.mean, posterior.logvar, decoded), strict=True):
        assert relative_error(each, expected) < 1e-4
    statistics = gradients.pop("bn", {})
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(statistics))
    assert max(gradient_errors(gradients, theirs).values()) < 1e-3


def _normalised(theirs: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """What the pipelines of diffusers give to the denoiser."""
    config = theirs.config
    if "batch_norm_eps" not in config:
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor
    places = diffusers.Flux2KleinPipeline._patchify_latents(latents)
    deviation = torch.sqrt(theirs.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
    return (places - theirs.bn.running_mean.view(1, -1, 1, 1)) / deviation


@pytest.mark.parametrize("name", KINDS)
def test_a_denoiser_has_the_latents_that_pytorchs_pipelines_give_it(name: str) -> None:
    vae = KINDS[name]
    theirs, params = pytorchs(vae)
    latents = normal(2, vae.config["latent_channels"], 6, 10)
    normalised = vae.normalised(params, latents)
    assert relative_error(normalised, _normalised(theirs, torch.from_numpy(latents))) < 1e-6
    np.testing.assert_allclose(vae.denormalised(params, normalised), latents, atol=1e-5)


def test_the_statistics_are_not_moved_by_what_is_normalised_with_them() -> None:
    vae = KINDS["FLUX.2"]
    _, params = pytorchs(vae)
    latents = normal(2, 8, 6, 10)
    gradients = jax.grad(lambda params: jnp.square(vae.normalised(params, latents)).sum())(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_packed_places_are_a_channels_neighbours() -> None:
    latents = np.arange(2 * 4 * 6, dtype=np.float32).reshape(1, 2, 4, 6)
    places = packed(latents, (2, 2))
    assert places.shape == (1, 8, 2, 3)
    assert places[0, :4, 1, 2].tolist() == latents[0, 0, 2:4, 4:6].ravel().tolist()
    assert places[0, 4:, 0, 1].tolist() == latents[0, 1, 0:2, 2:4].ravel().tolist()
    np.testing.assert_array_equal(unpacked(places, (2, 2)), latents)
    with pytest.raises(ValueError, match="latents of 4 x 5 do not divide into places of 2 x 2"):
        packed(latents[..., :5], (2, 2))


@pytest.mark.parametrize("name", KINDS)
def test_files_come_back_bit_for_bit(name: str) -> None:
    assert_files_come_back(KINDS[name], pytorchs(KINDS[name])[0])


@pytest.mark.parametrize(("height", "width"), [(16, 10), (7, 17)])
def test_large_pictures_are_decoded_in_tiles_as_pytorch_does(height: int, width: int) -> None:
    vae = KINDS["FLUX.1"]
    theirs, params = pytorchs(vae)
    latents = normal(1, 16, height, width)
    theirs.enable_tiling()
    with torch.no_grad():
        expected = theirs.decode(torch.from_numpy(latents)).sample
    shapes = set()

    def decode(tile: Array) -> Array:
        shapes.add(tile.shape[-2:])
        return vae.decode(params, tile)

    ours = decode_in_tiles(jax.jit(decode), latents, vae.downscale, tile=8)
    assert ours.shape == (1, 3, 2 * height, 2 * width)
    assert max(max(shape) for shape in shapes) == 8
    # PyTorch fades twice where four tiles meet, and adds a row of tiles of which the row before has all places.
    rows, columns = np.arange(2 * height)[:, None], np.arange(2 * width)
    fades = [np.isin(places, [*range(12, 16), *range(24, 28)]) for places in (rows, columns)]
    compared = ~(fades[0] & fades[1]) & (rows < 12 if height < 8 else True)
    assert compared.sum() > 0.8 * compared.size
    assert relative_error(ours * compared, expected * torch.from_numpy(compared)) < 1e-4
    # Where no tile ends, it is nearly the picture of one piece.
    whole = np.asarray(vae.decode(params, latents))
    assert np.abs(ours - whole).mean() < 0.5 * np.abs(whole).mean()


def test_bfloat16_drifts_by_little() -> None:
    """Of the largest value, in a small model with random weights: encoding 1.4 %, decoding 1.2 %."""
    vae = KINDS["FLUX.1"]
    theirs, params = pytorchs(vae)
    half = dataclasses.replace(vae, dtype=jnp.bfloat16)
    pixels = normal(2, 3, 16, 16)
    with torch.no_grad():
        mean = theirs.encode(torch.from_numpy(pixels)).latent_dist.mean
        decoded = theirs.decode(mean).sample
    ours = half.encode(params, pixels)[0]
    assert ours.dtype == jnp.float32
    assert 1e-4 < relative_error(ours, mean) < 0.03
    assert 1e-4 < relative_error(half.decode(params, mean.numpy()), decoded) < 0.03


# From the published config.json files.
_SIZES = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024}
_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
FULL = {
    "FLUX.1": KLAutoencoder({**FLUX1, **_SIZES, **_BLOCKS}),
    "FLUX.2": KLAutoencoder({**FLUX2, **_SIZES, **_BLOCKS, "latent_channels": 32}, class_name="AutoencoderKLFlux2"),
    "Stable Diffusion": KLAutoencoder({**STABLE_DIFFUSION, **_SIZES, **_BLOCKS}),
}


@pytest.mark.parametrize(("name", "parameters"), [("FLUX.1", 83.8e6), ("FLUX.2", 84.0e6), ("Stable Diffusion", 83.7e6)])
def test_the_published_models_have_pytorchs_names_and_shapes(name: str, parameters: float) -> None:
    assert_names_and_shapes(FULL[name], parameters)
