"""CLIP's text transformer gives the numbers and the gradients of transformers' PyTorch classes."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jaxtyping import Array, PyTree
from transformers.models.clip.modeling_clip import CLIPAttention

from offsetjax.errors import UserError
from offsetjax.models.attention import attend
from offsetjax.models.clip import ClipAttention, ClipConfig, ClipText
from offsetjax.models.text import TextEncoder
from offsetjax.models.weights import abstract_params
from tests import tiny, torch_models
from tests.torch_models import counterpart, gradient_errors, params_of, relative_error

FLOAT32 = jnp.dtype("float32")
SMALL = {**torch_models.TEXT, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
# No size is a power of two, none equals another.
ODD = SMALL | {
    "vocab_size": 101,
    "hidden_size": 21,
    "intermediate_size": 35,
    "num_hidden_layers": 3,
    "num_attention_heads": 7,
    "max_position_embeddings": 11,
    "projection_dim": 13,
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(pathlib.Path(tmp_path_factory.getbasetemp())):
        yield


def ids_of(config: dict[str, Any], batch: int, length: int) -> np.ndarray:
    ids = np.random.default_rng(length).integers(0, config["vocab_size"] - 1, (batch, length), dtype=np.int32)
    ids[:, -2] = config["vocab_size"] - 1  # the end of the text
    ids[0, length // 2 :] = config["vocab_size"] - 1  # padding like it, which is attended to
    return ids


@pytest.mark.parametrize(
    ("changes", "is_penultimate", "has_projection", "batch", "length"),
    [
        ({}, False, False, 3, 12),
        ({"hidden_act": "gelu"}, False, False, 3, 12),
        (ODD, True, False, 2, 11),
        (ODD | {"hidden_act": "gelu"}, True, True, 3, 7),
        (ODD | {"hidden_act": "gelu", "num_hidden_layers": 1, "layer_norm_eps": 1e-3}, False, True, 1, 5),
    ],
    ids=["SD 1", "SD 2", "SDXL's first", "SDXL's second", "one layer"],
)
def test_states_and_gradients_are_pytorchs(
    changes: dict[str, Any], is_penultimate: bool, has_projection: bool, batch: int, length: int
) -> None:
    config = SMALL | changes
    encoder = TextEncoder(config, FLOAT32, is_penultimate, has_projection)
    theirs, ids = counterpart(encoder), ids_of(config, batch, length)
    rng = np.random.default_rng(1)
    wanted = rng.standard_normal((batch, length, config["hidden_size"])).astype(np.float32)
    wanted_pooled = rng.standard_normal((batch, config["projection_dim"])).astype(np.float32)

    def loss(params: PyTree) -> tuple[Array, Any]:
        hidden, pooled = encoder.apply(params, ids)
        of_pooled = 0.0 if pooled is None else jnp.mean(pooled * wanted_pooled)
        return jnp.mean(hidden * wanted) + of_pooled, (hidden, pooled)

    gradients, (hidden, pooled) = jax.jit(jax.grad(loss, has_aux=True))(params_of(theirs, encoder))
    output = theirs(torch.from_numpy(ids), output_hidden_states=True)
    expected = output.hidden_states[-2] if is_penultimate else output.last_hidden_state
    of_pooled = (output.text_embeds * torch.from_numpy(wanted_pooled)).mean() if has_projection else 0.0
    ((expected * torch.from_numpy(wanted)).mean() + of_pooled).backward()

    assert relative_error(hidden, expected) < 1e-4
    if has_projection:
        assert relative_error(pooled, output.text_embeds) < 1e-4
    else:
        assert pooled is None
    errors = gradient_errors(gradients, theirs)
    assert max(errors.values()) < 1e-3, errors


def test_bfloat16_attention_is_as_exact_as_pytorchs() -> None:
    """The softmax is taken in float32: taken in bfloat16 it is less exact."""
    theirs = CLIPAttention(
        transformers.CLIPTextConfig(hidden_size=32, num_attention_heads=4, attn_implementation="eager")
    )
    module = ClipAttention(32, 4, jnp.dtype("bfloat16"))
    x = 6 * np.random.default_rng(3).standard_normal((2, 77, 32)).astype(np.float32)
    weights = {name: value.detach().numpy() for name, value in torch_models.randomise(theirs).named_parameters()}
    params = {
        layer: {"kernel": weights[f"{layer}.weight"].T, "bias": weights[f"{layer}.bias"]}
        for layer in ("q_proj", "k_proj", "v_proj", "out_proj")
    }

    def run(dtype: torch.dtype) -> np.ndarray:
        mask = torch.full((x.shape[1],) * 2, torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
        with torch.no_grad():
            output = theirs.to(dtype)(torch.from_numpy(x).to(dtype), causal_attention_mask=mask)
        return output[0].float().numpy()

    def in_half(query: Array, key: Array, value: Array, heads: int, mask: Array) -> Array:
        query, key, value = (each.reshape(*each.shape[:2], heads, -1) for each in (query, key, value))
        scores = jnp.einsum("bnke,bmke->bknm", query, key) * query.shape[-1] ** -0.5
        mixed = jnp.einsum("bknm,bmke->bnke", jax.nn.softmax(scores, where=mask), value)
        return mixed.reshape(*mixed.shape[:2], -1)

    def ours(attention: Any) -> np.ndarray:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("offsetjax.models.clip.attend", attention)
            return np.asarray(module.apply({"params": params}, jnp.asarray(x, jnp.bfloat16)), np.float32)

    exact = run(torch.float32)

    def error(values: np.ndarray) -> float:
        return float(np.sqrt(np.square(values - exact).mean() / np.square(exact).mean()))

    assert error(ours(attend)) < 1.1 * error(run(torch.bfloat16))
    assert error(ours(attend)) < 0.95 * error(ours(in_half))


def test_normalisation_sees_differences_that_are_small_beside_the_mean() -> None:
    """Of tokens whose channels are 100 ± 1, as E x² - (E x)² in float32 does not."""
    config = SMALL | {"num_hidden_layers": 1}
    encoder = TextEncoder(config, FLOAT32)
    theirs, ids = counterpart(encoder), ids_of(config, 2, 12)
    with torch.no_grad():
        theirs.text_model.embeddings.position_embedding.weight += 100.0
        expected = theirs(torch.from_numpy(ids)).last_hidden_state
    assert relative_error(encoder.apply(params_of(theirs, encoder), ids)[0], expected) < 1e-4


def test_half_precision_multiplies_in_it_and_sums_in_float32() -> None:
    config = SMALL | {"num_hidden_layers": 1}
    half = TextEncoder(config, jnp.dtype("bfloat16"), has_projection=True)
    params, ids = abstract_params(half), ids_of(config, 2, 12)
    graph = str(jax.make_jaxpr(half.apply)(params, ids))
    products = [line.split(":")[1].split("[")[0] for line in graph.splitlines() if "= dot_general[" in line]
    assert products.count("bf16") == 4 + 1 + 2 + 1, "the layers', of the weights with the values, the projection"
    assert products.count("f32") == 1, "the scores"
    hidden, pooled = jax.eval_shape(half.apply, params, ids)
    assert (hidden.dtype, pooled.dtype) == (jnp.bfloat16, jnp.bfloat16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size = 24, which must be a multiple of num_attention_heads = 5"),
        ({"num_hidden_layers": 0}, "0 layers"),
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new', which must be one of quick_gelu, gelu"),
    ],
)
def test_what_no_such_network_has_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        abstract_params(TextEncoder(SMALL | changes, FLOAT32))


def test_the_same_weights_are_drawn_whatever_is_read_of_them() -> None:
    """The parameters depend on the architecture and the key alone."""
    config = ClipConfig(**SMALL)
    key, ids = jax.random.key(5), jnp.zeros((1, 1), jnp.int32)
    whole = jax.jit(ClipText(config, FLOAT32).init)(key, ids)
    for module in (ClipText(config, jnp.dtype("bfloat16"), True), ClipText(config, FLOAT32, True, True)):
        drawn = jax.jit(module.init)(key, ids)["params"]["text_model"]
        jax.tree.map(np.testing.assert_array_equal, drawn, whole["params"]["text_model"])
