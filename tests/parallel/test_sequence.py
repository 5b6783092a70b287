"""Tokens are split over the devices of the tensor axis, and what comes out is the same."""

import pathlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.models.flux2 import Flux2Transformer
from offsetjax.models.qwen3 import Qwen3
from offsetjax.models.sd3 import SD3Transformer
from offsetjax.models.t5 import T5Encoder
from offsetjax.models.z_image import ZImageTransformer
from offsetjax.parallel.sequence import split_over_devices
from offsetjax.parallel.sharding import mesh_of, path_name, spec
from tests import tiny
from tests.models import test_flux2, test_sd3, test_text_encoders
from tests.models.test_z_image import LENGTHS, SMALL, inputs


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(pathlib.Path(tmp_path_factory.getbasetemp())):
        yield


def test_tokens_are_split_where_there_are_devices_for_them_and_their_number_divides() -> None:
    x = jnp.arange(2 * 8 * 4, dtype=jnp.float32).reshape(2, 8, 4)
    split = jax.jit(lambda x: split_over_devices(jnp.sin(x)))
    with jax.set_mesh(mesh_of(data=1, fsdp=1, tensor=4)):
        assert split(x).sharding.shard_shape(x.shape) == (2, 2, 4)
        assert split(x[:, :6]).sharding.is_fully_replicated
    with jax.set_mesh(mesh_of(data=1, fsdp=4, tensor=1)):
        assert split(x).sharding.is_fully_replicated
    np.testing.assert_allclose(split(x), jnp.sin(x), rtol=1e-6)


def test_a_networks_blocks_keep_a_share_of_the_tokens_and_predict_the_same() -> None:
    network = ZImageTransformer(SMALL, jnp.float32)
    params = jax.tree.map(lambda leaf: leaf + 0.01, network.init(jax.random.key(0)))
    values = inputs(8, 12)
    alone = jax.jit(network.apply)(params, *values, LENGTHS)
    with jax.set_mesh(mesh_of(data=1, fsdp=1, tensor=2)):
        compiled = jax.jit(network.apply).lower(params, *values, LENGTHS).compile()
        together = compiled(params, *values, LENGTHS)
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max())
    # 32 tokens of the picture and 64 of the text, of 36 channels: each device adds to half of them.
    sums = re.findall(r"f32\[3,(\d+),36\]\S* add\(", compiled.as_text())
    assert "48" in sums


NETWORKS = {
    "Z-Image": (ZImageTransformer(SMALL, jnp.float32), ()),
    # In single blocks all is one kernel, of which each device computes its own tokens.
    "FLUX.2": (Flux2Transformer(test_flux2.SMALL, jnp.float32), ("to_qkv_mlp_proj", "attn/to_out/")),
    "SD 3": (SD3Transformer(test_sd3.SMALL, jnp.float32), ()),
    "Qwen3": (Qwen3(test_text_encoders.QWEN3, jnp.float32, states=(2,)), ()),
    "T5": (T5Encoder({**test_text_encoders.T5, "num_heads": 4}, jnp.float32), ()),
}
_PAIRS = re.compile(
    r"/(attention|feed_forward|attn2?|ff|ff_context|self_attn|mlp|SelfAttention|DenseReluDense)/.*kernel$"
)


@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_of_layers_are_split_over_the_tensor_axis_by_columns_then_rows(name: str) -> None:
    network, whole = NETWORKS[name]
    params = jax.eval_shape(network.init, jax.random.key(0))
    split = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if _PAIRS.search(where := path_name(path)):
            split[where] = tuple(spec(where, leaf.shape, {"data": 1, "fsdp": 1, "tensor": 2}, network.sharding))
    assert split
    for where, axes in split.items():
        if any(each in where for each in whole):
            assert axes == ()
            continue
        is_second = re.search(r"/(to_out_0|to_add_out|o_proj|o|w2|net_2|linear_out|down_proj|wo)/kernel$", where)
        assert axes == (("tensor", None) if is_second else (None, "tensor")), where
