"""Z-Image's denoiser gives PyTorch's prediction and gradients, for pictures of any shape and captions of any length."""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from offsetjax.models.z_image import ZImageTransformer
from tests import tiny
from tests.models.judge import assert_as_pytorch, assert_files_come_back, assert_names_and_shapes, normal
from tests.torch_models import counterpart, params_of, relative_error

SMALL = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 5,
    "dim": 36,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 20,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": (4, 6, 8),
    "axes_lens": (128, 32, 32),
}
# Of https://huggingface.co/Tongyi-MAI/Z-Image-Turbo, transformer/config.json.
FULL = {
    **SMALL,
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": (32, 48, 48),
    "axes_lens": (1536, 512, 512),
}
LENGTHS = np.array([40, 3, 32], np.int32)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(pathlib.Path(tmp_path_factory.getbasetemp())):
        yield


def inputs(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents, times and captions, which hold nonsense beyond their lengths."""
    return normal(3, 5, height, width), np.array([0.03, 0.5, 0.98], np.float32), 3 * normal(3, 45, 20)


def pytorchs(theirs: torch.nn.Module, latents: np.ndarray, times: np.ndarray, text: np.ndarray) -> torch.Tensor:
    pictures = [torch.from_numpy(each)[:, None] for each in latents]
    captions = [torch.from_numpy(each[:length]) for each, length in zip(text, LENGTHS, strict=True)]
    output = theirs(pictures, torch.from_numpy(times), captions, return_dict=False)[0]
    return torch.stack([each[:, 0] for each in output])


# 40 tokens, which are filled up to 64, and 64, which are whole.
@pytest.mark.parametrize(("height", "width"), [(10, 16), (16, 16)])
def test_the_prediction_and_its_gradients_are_pytorchs(height: int, width: int) -> None:
    network = ZImageTransformer(SMALL, jnp.float32)
    theirs = counterpart(network)
    latents, times, text = inputs(height, width)
    assert_as_pytorch(
        lambda params: network.apply(params, latents, times, text, LENGTHS),
        params_of(theirs, network),
        theirs,
        pytorchs(theirs, latents, times, text),
    )


def test_a_caption_is_read_up_to_its_length() -> None:
    network = ZImageTransformer(SMALL, jnp.float32)
    params = params_of(counterpart(network), network)
    latents, times, text = inputs(6, 4)
    apply = jax.jit(network.apply)
    expected = apply(params, latents, times, text, LENGTHS)
    other = np.where(np.arange(45)[:, None] < LENGTHS[:, None, None], text, 1e3)
    np.testing.assert_array_equal(apply(params, latents, times, other, LENGTHS), expected)
    other[1, 2] += 1
    assert np.abs(apply(params, latents, times, other, LENGTHS) - expected)[1].max() > 1e-4


def test_files_come_back_bit_for_bit() -> None:
    network = ZImageTransformer(SMALL, jnp.float32)
    assert_files_come_back(network, counterpart(network))


def test_the_published_model_has_pytorchs_names_and_shapes() -> None:
    assert_names_and_shapes(ZImageTransformer(FULL, jnp.bfloat16), 6.15e9)


def test_bfloat16_drifts_by_little() -> None:
    """Of the largest value, in a small model with random weights: 1.6 %."""
    network = ZImageTransformer(SMALL, jnp.float32)
    theirs = counterpart(network)
    half = dataclasses.replace(network, dtype=jnp.bfloat16)
    values = inputs(6, 4)
    ours = jax.jit(half.apply)(params_of(theirs, network), *values, LENGTHS)
    assert ours.dtype == jnp.float32
    assert 1e-4 < relative_error(ours, pytorchs(theirs, *values)) < 0.03


@pytest.mark.parametrize(
    "changes", [{"n_kv_heads": 1}, {"siglip_feat_dim": 8}, {"all_patch_size": (2, 4)}, {"all_f_patch_size": (2,)}]
)
def test_a_config_of_another_form_is_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=r"Z-Image: .* known"):
        ZImageTransformer({**SMALL, **changes}, jnp.float32)


def test_latents_that_do_not_divide_into_patches_are_refused() -> None:
    network = ZImageTransformer(SMALL, jnp.float32)
    with pytest.raises(ValueError, match="latents of 5 x 4 do not divide into patches of 2 x 2"):
        jax.eval_shape(
            network.apply, jax.eval_shape(network.init, jax.random.key(0)), *inputs(5, 4), np.array([1, 1, 1])
        )
