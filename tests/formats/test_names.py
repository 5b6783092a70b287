"""Flax's parameters go by PyTorch's names, at the published sizes, and come back from them; others are refused."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from offsetjax.config import default_config
from offsetjax.errors import UserError
from offsetjax.formats.names import flax_tensors, torch_tensors
from offsetjax.formats.tensors import Tensor, of_array
from offsetjax.models.autoencoder import Autoencoder
from offsetjax.models.text import TextEncoder
from offsetjax.models.unet import UNet
from tests import torch_models
from tests.formats import published

FLOAT32 = jnp.dtype("float32")
TEXT = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers")


def abstract(part: str, config: dict[str, Any]) -> PyTree:
    """The shapes of our model's parameters."""
    if part == "unet":
        depths = config["transformer_layers_per_block"]
        settings = {
            "in_channels": 4,
            "norm_num_groups": 32,
            "addition_embed_type": "",
            "addition_time_embed_dim": 0,
            "projection_class_embeddings_input_dim": 0,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
        } | config
        settings["transformer_layers_per_block"] = (depths,) * 4 if isinstance(depths, int) else tuple(depths)
        model: Any = UNet({key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}, FLOAT32)
    elif part == "vae":
        fixed = {"in_channels": 3, "latent_channels": 4, "norm_num_groups": 32, "mid_block_add_attention": True}
        model = Autoencoder({key: tuple(v) if isinstance(v, list) else v for key, v in (config | fixed).items()})
    else:
        keys = (*TEXT, "hidden_act", "projection_dim", "vocab_size")
        model = TextEncoder({key: config[key] for key in keys}, FLOAT32, has_projection=part == "text_encoder_2")
    return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("family", published.FAMILIES)
def test_the_published_sizes_have_pytorchs_names_and_shapes(family: str) -> None:
    with torch.device("meta"):
        theirs = published.models(family, narrow=False)
    for part, config in published.configs(family, narrow=False).items():
        expected = {name: tuple(tensor.shape) for name, tensor in theirs[part].state_dict().items()}
        ours = {name: tensor.shape for name, tensor in torch_tensors(abstract(part, config)).items()}
        assert ours == expected


def test_pytorchs_weights_come_back_bit_for_bit() -> None:
    configs = published.configs("sdxl", narrow=True)
    for part, model in published.random_models("sdxl").items():
        theirs = published.tensors(model)
        params = flax_tensors(theirs, abstract(part, configs[part]), part)
        arrays = jax.tree.map(lambda tensor: tensor(), params, is_leaf=lambda leaf: isinstance(leaf, Tensor))
        for back in (torch_tensors(params), torch_tensors(arrays)):  # of tensors, and of arrays
            assert back.keys() == theirs.keys()
            for name, tensor in theirs.items():
                np.testing.assert_array_equal(back[name](), tensor(), strict=True)


VAE_ATTENTION = "decoder.mid_block.attentions.0."
LIKE = {
    "decoder": {
        "mid_block": {
            "attentions_0": {
                "query": {"kernel": np.zeros((3, 3)), "bias": np.zeros(3)},
                "proj_attn": {"kernel": np.zeros((3, 3)), "bias": np.zeros(3)},
                "group_norm": {"scale": np.zeros(3), "bias": np.zeros(3)},
            }
        },
        "conv_out": {"kernel": np.zeros((3, 3, 8, 4)), "bias": np.zeros(4)},
    }
}


def random_tensors() -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    return {
        name: of_array(rng.normal(size=tensor.shape).astype(np.float32)) for name, tensor in torch_tensors(LIKE).items()
    }


def test_layouts_are_those_of_the_frameworks() -> None:
    tensors = random_tensors()
    params = flatten_dict(flax_tensors(tensors, LIKE, "vae"), sep="/")
    kernel, weight = params["decoder/conv_out/kernel"](), tensors["decoder.conv_out.weight"]()
    assert kernel.shape == (3, 3, 8, 4) and weight.shape == (4, 8, 3, 3)
    assert kernel[0, 1, 5, 2] == weight[2, 5, 0, 1]
    query = params["decoder/mid_block/attentions_0/query/kernel"]()
    np.testing.assert_array_equal(query, tensors[f"{VAE_ATTENTION}to_q.weight"]().T)


@pytest.mark.parametrize("trailing", [0, 1, 2])
def test_names_and_convolutions_of_before_2023_are_understood(trailing: int) -> None:
    """Old autoencoders name their attention otherwise, as 1x1 convolutions; old text encoders hold a buffer."""
    modern, old = random_tensors(), {}
    for name, tensor in modern.items():
        array = tensor()
        if array.ndim == 2:
            array = array.reshape(array.shape + (1,) * trailing)
        old[re.sub(r"\.to_q\.", ".query.", name).replace(".to_out.0.", ".proj_attn.")] = of_array(array)
    assert f"{VAE_ATTENTION}proj_attn.weight" in old
    old["text_model.embeddings.position_ids"] = of_array(np.arange(77)[None])
    read = flax_tensors(old, LIKE, "vae")
    expected = flax_tensors(modern, LIKE, "vae")
    is_leaf = {"is_leaf": lambda leaf: isinstance(leaf, Tensor)}
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one(), other()), read, expected, **is_leaf)


def test_missing_extra_and_misshapen_tensors_are_named() -> None:
    tensors = random_tensors()
    tensors.pop("decoder.conv_out.bias")
    tensors["decoder.conv_new.weight"] = of_array(np.zeros((2, 2)))
    tensors["decoder.conv_out.weight"] = of_array(np.zeros((5, 8, 3, 3)))
    tensors[f"{VAE_ATTENTION}to_q.weight"] = of_array(np.zeros((3, 3, 3, 3)))
    with pytest.raises(UserError) as caught:
        flax_tensors(tensors, LIKE, "model.pretrained: here/vae")
    message = str(caught.value)
    assert message.startswith("model.pretrained: here/vae: ") and "\n" not in message
    assert "decoder.conv_out.bias is missing" in message
    assert "decoder.conv_new.weight is not part of the model" in message
    assert "decoder.conv_out.weight has shape (5, 8, 3, 3), not (4, 8, 3, 3)" in message
    assert f"{VAE_ATTENTION}to_q.weight has shape (3, 3, 3, 3), not (3, 3)" in message
    assert message.endswith("is it the checkpoint of another model?")


def test_many_problems_are_counted() -> None:
    with pytest.raises(UserError, match=r"is missing and \d+ more; is it the checkpoint of another model\?"):
        flax_tensors({"a": of_array(np.zeros(1))}, LIKE, "vae")


def test_text_encoders_of_newer_transformers_lack_a_module() -> None:
    config = default_config().model.text_encoder.to_dict() | torch_models.TEXT
    like = jax.eval_shape(TextEncoder(config, FLOAT32, has_projection=True).init, jax.random.key(0))
    named = torch_tensors(jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), like))
    bare = {name.removeprefix("text_model."): tensor for name, tensor in named.items()}
    assert bare.keys() != named.keys()
    assert jax.tree.structure(flax_tensors(bare, like, "test")) == jax.tree.structure(flax_tensors(named, like, "test"))
