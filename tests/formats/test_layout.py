"""Files in the original layouts become diffusers' as diffusers itself converts them, and come back bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils

from offsetjax.errors import UserError
from offsetjax.formats.flux2_names import FLUX2
from offsetjax.formats.layout import PREFIX, Layout, Rule
from offsetjax.formats.tensors import of_array
from offsetjax.formats.z_image_names import Z_IMAGE
from offsetjax.models.flux2 import Flux2Transformer
from offsetjax.models.z_image import ZImageTransformer
from tests.models import test_flux2, test_z_image
from tests.torch_models import counterpart

MODELS = {
    "FLUX.2": (
        FLUX2,
        Flux2Transformer({**test_flux2.SMALL, "guidance_embeds": True, "num_single_layers": 11}, jnp.float32),
        single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    ),
    "Z-Image": (
        Z_IMAGE,
        ZImageTransformer(test_z_image.SMALL, jnp.float32),
        single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_reads_the_original_layout_as_we_do(name: str) -> None:
    layout, network, convert = MODELS[name]
    expected = {name: tensor.numpy() for name, tensor in counterpart(network).state_dict().items()}
    original = layout.to_original({name: of_array(array) for name, array in expected.items()})
    assert not original.keys() & {key for key in expected if "to_q" in key or "norm_out" in key or "2-1" in key}
    converted = convert({key: torch.from_numpy(tensor().copy()) for key, tensor in original.items()})
    ours = layout.to_diffusers({PREFIX + key: tensor for key, tensor in original.items()}, "a test")
    assert converted.keys() == ours.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(converted[key].numpy(), array)
        np.testing.assert_array_equal(ours[key](), array)
    again = layout.to_original(ours)
    assert again.keys() == original.keys()
    for key, tensor in original.items():
        np.testing.assert_array_equal(again[key](), tensor())


def test_files_whose_queries_keys_and_values_are_not_fused_are_read_too() -> None:
    layout, network, _ = MODELS["Z-Image"]
    tensors = {name: of_array(tensor.numpy()) for name, tensor in counterpart(network).state_dict().items()}
    original = layout.to_original(tensors)
    split = {name: tensor for name, tensor in original.items() if "qkv" not in name}
    split |= {
        name: tensor for name, tensor in tensors.items() if ".to_q." in name or ".to_k." in name or ".to_v." in name
    }
    assert layout.to_diffusers(split | {"norm_final.weight": of_array(np.zeros(3))}, "a test").keys() == tensors.keys()


def test_layers_of_the_original_name_those_that_they_hold() -> None:
    names = [
        "transformer_blocks.3.attn.to_q",
        "transformer_blocks.3.attn.to_k",
        "transformer_blocks.3.attn.to_v",
        "other",
    ]
    layers = FLUX2.layers(names)
    assert layers == {"double_blocks.3.img_attn.qkv": tuple(names[:3]), "other": ("other",)}
    assert FLUX2.layers(names[:2]) == {name: (name,) for name in names[:2]}


def test_a_fused_tensor_that_does_not_divide_is_refused() -> None:
    layout = Layout((Rule("qkv.weight", ("q.weight", "k.weight", "v.weight")),))
    with pytest.raises(UserError, match=r"a test: qkv\.weight has 4 rows, which are not 3 of a size; fetch it again"):
        layout.to_diffusers({"qkv.weight": of_array(np.zeros((4, 2)))}, "a test")
