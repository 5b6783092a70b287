"""Qwen3 and T5 give PyTorch's hidden states and gradients, for captions of unequal lengths."""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from offsetjax.models import t5
from offsetjax.models.qwen3 import Qwen3, unpadded_lengths
from offsetjax.models.t5 import T5Encoder
from tests import tiny
from tests.models.judge import assert_as_pytorch, assert_files_come_back, assert_names_and_shapes
from tests.torch_models import counterpart, params_of

QWEN3 = {
    "vocab_size": 97,
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
T5 = {
    "vocab_size": 97,
    "num_layers": 3,
    "d_model": 24,
    "d_kv": 10,
    "d_ff": 40,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}
LENGTHS = np.array([13, 6, 1], np.int32)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(pathlib.Path(tmp_path_factory.getbasetemp())):
        yield


def captions() -> tuple[np.ndarray, np.ndarray]:
    """Ids, padded on the right, and PyTorch's mask."""
    ids = np.random.default_rng(0).integers(1, 97, (3, 13)).astype(np.int32)
    mask = np.arange(13) < LENGTHS[:, None]
    return np.where(mask, ids, 0), mask


def test_qwen3s_states_and_gradients_are_pytorchs() -> None:
    # Without the name of the padding, whose embedding PyTorch would give no gradient.
    encoder = Qwen3({**QWEN3, "pad_token_id": None}, jnp.float32, states=(0, 1, 2, 3))
    theirs = counterpart(encoder)
    ids, mask = captions()
    output = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True)
    expected = torch.cat(output.hidden_states, dim=-1)  # also of what pads a caption, which FLUX.2 attends to
    assert expected.shape == (3, 13, encoder.width)
    assert_as_pytorch(lambda params: encoder.apply(params, ids, LENGTHS), params_of(theirs, encoder), theirs, expected)


@pytest.mark.parametrize(("states", "layers"), [((2,), 2), ((0, 1), 1), ((0,), 0)])
def test_qwen3_stops_after_the_last_layer_that_is_asked_for(states: tuple[int, ...], layers: int) -> None:
    every = Qwen3(QWEN3, jnp.float32, states=(0, 1, 2))
    params = params_of(counterpart(every), every)
    ids, _ = captions()
    encoder = dataclasses.replace(every, states=states)
    whole = np.split(np.asarray(every.apply(params, ids)), 3, axis=-1)
    np.testing.assert_array_equal(encoder.apply(params, ids), np.concatenate([whole[i] for i in states], axis=-1))
    used = {name for name in params["model"] if name.startswith("layers_")} - {
        name for name in params["model"] if name.startswith("layers_") and int(name[7:]) >= layers
    }
    without = {"model": {name: params["model"][name] for name in ("embed_tokens", *used)}}
    np.testing.assert_array_equal(encoder.apply(without, ids), encoder.apply(params, ids))


def test_lengths_are_those_before_the_padding() -> None:
    ids, _ = captions()
    ids[0, 4] = 0  # the same token within a caption is no padding
    np.testing.assert_array_equal(unpadded_lengths(ids, 0), LENGTHS)
    encoder = Qwen3(QWEN3, jnp.float32, states=(2,))
    params = encoder.init(jax.random.key(0))
    np.testing.assert_array_equal(encoder.apply(params, ids), encoder.apply(params, ids, LENGTHS))


@pytest.mark.parametrize("form", ["gated-gelu", "relu"])
def test_t5s_states_and_gradients_are_pytorchs(form: str) -> None:
    encoder = T5Encoder({**T5, "feed_forward_proj": form}, jnp.float32)
    theirs = counterpart(encoder)
    params = params_of(theirs, encoder)
    ids, mask = captions()
    for lengths, seen in ((None, None), (LENGTHS, torch.from_numpy(mask))):
        expected = theirs(torch.from_numpy(ids), attention_mask=seen).last_hidden_state
        assert_as_pytorch(lambda params, lengths=lengths: encoder.apply(params, ids, lengths), params, theirs, expected)


@pytest.mark.parametrize(("count", "furthest"), [(32, 128), (8, 20)])
def test_t5s_buckets_are_pytorchs_at_every_distance(count: int, furthest: int) -> None:
    distance = torch.arange(512)[None] - torch.arange(512)[:, None]
    expected = T5Attention._relative_position_bucket(distance, True, count, furthest)
    np.testing.assert_array_equal(t5.buckets(512, count, furthest), expected.numpy())


def test_t5_of_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="T5: feed_forward_proj = 'gated-silu' is not known"):
        T5Encoder({**T5, "feed_forward_proj": "gated-silu"}, jnp.float32)


ENCODERS = {"Qwen3": Qwen3(QWEN3, jnp.float32, states=(2,)), "T5": T5Encoder(T5, jnp.float32)}


@pytest.mark.parametrize("name", ENCODERS)
def test_files_come_back_bit_for_bit(name: str) -> None:
    assert_files_come_back(ENCODERS[name], counterpart(ENCODERS[name]))


@pytest.mark.parametrize("name", ENCODERS)
def test_bfloat16_drifts_by_little(name: str) -> None:
    """Of the largest value, in small models with random weights: Qwen3 1.3 %, T5 4.1 %."""
    encoder = ENCODERS[name]
    params = params_of(counterpart(encoder), encoder)
    for place in range(T5["num_layers"]):  # whose queries are drawn smaller, as its scores are not scaled
        if name == "T5":
            params["encoder"][f"block_{place}"]["layer_0"]["SelfAttention"]["q"]["kernel"] *= T5["d_kv"] ** -0.5
    ids, _ = captions()
    exact = encoder.apply(params, ids)
    rounded = dataclasses.replace(encoder, dtype=jnp.bfloat16).apply(params, ids)
    assert rounded.dtype == jnp.bfloat16
    assert 1e-4 < np.abs(rounded.astype(jnp.float32) - exact).max() / np.abs(exact).max() < 0.06


# From the published config.json files of Qwen3-4B, of both pipelines, and of T5 1.1 XXL, of Stable Diffusion 3.
FULL = {
    "Qwen3-4B": Qwen3(
        {
            "vocab_size": 151_936,
            "num_hidden_layers": 36,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000,
        },
        jnp.bfloat16,
        states=(9, 18, 27),
    ),
    "T5-XXL": T5Encoder(
        {
            "vocab_size": 32_128,
            "num_layers": 24,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10_240,
            "num_heads": 64,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": "gated-gelu",
        },
        jnp.bfloat16,
    ),
}


@pytest.mark.parametrize(("name", "parameters"), [("Qwen3-4B", 4.02e9), ("T5-XXL", 4.76e9)])
def test_the_published_sizes_have_pytorchs_names_and_shapes(name: str, parameters: float) -> None:
    assert_names_and_shapes(FULL[name], parameters)
