"""LoRA: an adapted model is the model with merged weights, and PyTorch's PEFT agrees."""

import copy
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from offsetjax.config import default_config
from offsetjax.errors import UserError
from offsetjax.formats.lora_names import layers
from offsetjax.formats.names import flax_tensors, to_torch, torch_tensors
from offsetjax.formats.tensors import Tensor, of_array
from offsetjax.models.lora import Adapted, init_adapters, merged_tensors
from offsetjax.models.text import TextEncoder
from offsetjax.models.unet import UNet
from tests import tiny, torch_models

# Linear layers in attention and outside of it, convolutions of 1x1 and 3x3, with strides 1 and 2.
TARGETS = ("to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "downsamplers.0.conv", "time_embedding.linear_1")
RANK, ALPHA = 4, 2.0
# A denoiser that compiles quickly: it attends in its middle alone.
SMALL = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
FLOAT32 = jnp.dtype("float32")


@pytest.fixture(autouse=True, scope="module")
def _quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(tmp_path_factory.getbasetemp()):
        yield


def unet(dtype: str = "float32", **changes: Any) -> UNet:
    return UNet(default_config().model.unet.to_dict() | torch_models.UNET | changes, jnp.dtype(dtype))


def text_encoder() -> TextEncoder:
    return TextEncoder(default_config().model.text_encoder.to_dict() | torch_models.TEXT, FLOAT32)


def base_of(module: torch.nn.Module, model: Any) -> PyTree:
    """PyTorch's parameters as ours."""
    tensors = {name: of_array(parameter.detach().numpy().copy()) for name, parameter in module.named_parameters()}
    like = jax.eval_shape(model.init, jax.random.key(0))
    lazy = flax_tensors(tensors, like, "test")
    return jax.tree.map(lambda tensor: tensor(), lazy, is_leaf=lambda leaf: isinstance(leaf, Tensor))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomised(adapters: PyTree, seed: int = 7) -> PyTree:
    """Adapters of which neither half is 0, as after a training."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda array: rng.normal(0.0, 0.3, array.shape).astype(np.float32), adapters)


def inputs() -> tuple[np.ndarray, ...]:
    return normal(2, 4, 8, 8), np.array([3, 980], np.int32), normal(2, 5, 24)


def relative_error(ours: Any, theirs: Any) -> float:
    theirs = np.asarray(theirs.detach() if isinstance(theirs, torch.Tensor) else theirs, np.float32)
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())


def with_peft(module: torch.nn.Module, adapters: PyTree, targets: tuple[str, ...]) -> torch.nn.Module:
    """PyTorch's model with the same adapters, put there by PEFT."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets))
    module = peft.inject_adapter_in_model(config, module)
    arrays = flatten_dict(adapters)
    wanted = {
        f"{name}.{theirs}.default.weight": torch.from_numpy(
            to_torch(("kernel",), np.asarray(arrays[*path, ours])).copy()
        )
        for name, path in layers(adapters, "down").items()
        for ours, theirs in (("down", "lora_A"), ("up", "lora_B"))
    }
    assert wanted.keys() == {name for name in module.state_dict() if ".lora_" in name}
    module.load_state_dict(wanted, strict=False)
    return module.eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_change_nothing(dtype: str) -> None:
    model = unet(dtype, **SMALL)
    base = base_of(torch_models.unet(**SMALL), model)
    adapters = init_adapters(jax.random.key(1), base, TARGETS, RANK)
    # Otherwise XLA keeps float32 between some bfloat16 operations: which, depends on what stands around them.
    exactly = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    adapted = exactly(Adapted(model, 0.5).apply)({"base": base, "adapters": adapters}, *inputs())
    np.testing.assert_array_equal(adapted, exactly(model.apply)(base, *inputs()))


def merged_params(params: PyTree, adapters: PyTree, scale: float) -> PyTree:
    """The parameters with every adapter merged into its kernel."""
    result, halves = flatten_dict(params), flatten_dict(adapters)
    for path in layers(adapters, "down").values():
        down, up = halves[*path, "down"], halves[*path, "up"]
        result[*path, "kernel"] += scale * (down @ up.reshape(up.shape[-2:]))
    return unflatten_dict(result)


def test_outputs_and_gradients_are_those_of_the_model_with_merged_weights() -> None:
    model = unet(**SMALL)
    base = base_of(torch_models.unet(**SMALL), model)
    adapters = randomised(init_adapters(jax.random.key(1), base, TARGETS, RANK))
    wanted = normal(2, 4, 8, 8, seed=5)

    def adapted_loss(adapters: PyTree) -> tuple[jax.Array, jax.Array]:
        prediction = Adapted(model, 0.5).apply({"base": base, "adapters": adapters}, *inputs())
        return jnp.square(prediction - wanted).mean(), prediction

    def merged_loss(adapters: PyTree) -> tuple[jax.Array, jax.Array]:
        prediction = model.apply(merged_params(base, adapters, 0.5), *inputs())
        return jnp.square(prediction - wanted).mean(), prediction

    (_, ours), found = jax.jit(jax.value_and_grad(adapted_loss, has_aux=True))(adapters)
    merged = jax.jit(jax.value_and_grad(merged_loss, has_aux=True))
    (_, theirs), expected = merged(adapters)
    (_, plain), _ = merged(jax.tree.map(np.zeros_like, adapters))
    assert relative_error(plain, theirs) > 0.1, "the adapters do something"
    assert relative_error(ours, theirs) < 1e-5
    largest = max(np.abs(gradient).max() for gradient in jax.tree.leaves(expected))
    for path, gradient in flatten_dict(expected).items():
        scale = max(np.abs(gradient).max(), 1e-3 * largest)
        assert np.abs(flatten_dict(found)[path] - gradient).max() < 1e-4 * scale, path


def test_a_base_in_bfloat16_computes_in_it_and_only_float32_adapters_are_trained() -> None:
    model = unet("bfloat16", **SMALL)
    base = base_of(torch_models.unet(**SMALL), model)
    half = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), base)
    adapters = init_adapters(jax.random.key(1), half, TARGETS, RANK)

    def loss(adapters: PyTree) -> jax.Array:
        return jnp.square(Adapted(model, 0.5).apply({"base": half, "adapters": adapters}, *inputs())).mean()

    graph = str(jax.make_jaxpr(loss)(adapters))
    assert set(re.findall(r":(\w+)\[[\d,]*\] = conv_general_dilated\[", graph)) == {"bf16"}
    gradients = flatten_dict(jax.jit(jax.grad(loss))(adapters))
    assert gradients.keys() == flatten_dict(adapters).keys()
    assert {gradient.dtype for gradient in gradients.values()} == {FLOAT32}
    for (*path, side), gradient in gradients.items():
        # At the start `up` is 0: what `down` is does not matter yet, and `up` is pulled at once.
        assert (np.abs(gradient).max() > 0) == (side == "up"), path


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_the_denoiser_with_adapters_is_pefts(dtype: str, error: float) -> None:
    theirs, model = torch_models.unet(), unet(dtype)
    base = base_of(theirs, model)
    adapters = randomised(init_adapters(jax.random.key(1), base, TARGETS, RANK))
    theirs = with_peft(theirs, adapters, TARGETS)
    base = jax.tree.map(lambda array: jnp.asarray(array, dtype), base)
    ours = jax.jit(Adapted(model, ALPHA / RANK).apply)({"base": base, "adapters": adapters}, *inputs())
    with torch.no_grad():
        prediction = theirs(*map(torch.from_numpy, inputs())).sample
    assert ours.dtype == FLOAT32
    assert relative_error(ours, prediction) < error


def test_the_text_encoder_with_adapters_is_pefts() -> None:
    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")
    model, theirs = text_encoder(), torch_models.text_encoder()
    base = base_of(theirs, model)
    adapters = randomised(init_adapters(jax.random.key(1), base, targets, RANK))
    theirs = with_peft(theirs, adapters, targets)
    input_ids = np.array([[598, 3, 77, 410, 599], [598, 5, 599, 599, 599]], np.int32)
    hidden, _ = jax.jit(Adapted(model, ALPHA / RANK).apply)({"base": base, "adapters": adapters}, input_ids)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(input_ids)).last_hidden_state
    assert relative_error(hidden, expected) < 1e-4


def test_merged_tensors_are_those_that_peft_merges_and_are_read_by_parts() -> None:
    theirs = torch_models.unet()
    base = base_of(theirs, unet())
    adapters = randomised(init_adapters(jax.random.key(1), base, TARGETS, RANK))
    theirs = with_peft(theirs, adapters, TARGETS)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    expected = {name.replace(".base_layer", ""): weight for name, weight in theirs.state_dict().items()}
    merged = merged_tensors(torch_tensors(base), adapters, ALPHA / RANK)
    assert merged.keys() == {name for name in expected if ".lora_" not in name}
    for name, tensor in merged.items():
        whole = tensor()
        np.testing.assert_allclose(whole, expected[name].numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
        index = (slice(1, 4), slice(2, 7))[: len(tensor.shape)]
        np.testing.assert_allclose(tensor.read(index), whole[index], rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_merged_tensor_of_a_half_precision_base_is_rounded_only_when_it_is_written() -> None:
    base = normal(6, 5).astype(np.float16)
    adapters = {"linear_1": {"down": normal(5, 2, seed=1), "up": normal(2, 6, seed=2) * 1e-4}}
    merged = merged_tensors({"linear_1.weight": of_array(base)}, adapters, 1.0)["linear_1.weight"]()
    assert merged.dtype == np.float32
    exact = base.astype(np.float64) + (adapters["linear_1"]["down"] @ adapters["linear_1"]["up"]).T
    np.testing.assert_allclose(merged, exact, rtol=1e-6)


def test_down_is_drawn_as_pytorch_draws_a_layer_and_by_the_layers_name() -> None:
    like = jax.eval_shape(unet().init, jax.random.key(0))
    key = jax.random.key(1)
    adapters = flatten_dict(init_adapters(key, like, ("conv1", "to_q"), 64))
    halves = {side: [array for path, array in adapters.items() if path[-1] == side] for side in ("down", "up")}
    for down, up in zip(halves["down"], halves["up"], strict=True):
        assert down.dtype == up.dtype == FLOAT32
        layer = torch.nn.Linear(math.prod(down.shape[:-1]), 1000, bias=False)
        assert abs(down.std() / layer.weight.std().item() - 1) < 0.05
        assert np.abs(down).max() <= math.prod(down.shape[:-1]) ** -0.5
        assert not up.any()
    assert len({float(down.ravel()[0]) for down in halves["down"]}) == len(halves["down"])
    fewer = flatten_dict(init_adapters(key, like, ("attn2.to_q",), 64))
    assert 0 < len(fewer) < len(adapters)
    for path, array in fewer.items():
        np.testing.assert_array_equal(array, adapters[path])


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("to_out", "did you mean to_out.0"),
        ("attn1.to_qq", "did you mean attn1.to_q"),
        ("q", "such as to_q"),
        ("o_q", "did you mean to_q"),
        ("norm1", "such as to_q"),
        ("up_blocks", ""),
    ],
)
def test_a_target_is_a_name_in_whole_components_of_a_layer_that_can_be_adapted(target: str, hint: str) -> None:
    like = jax.eval_shape(unet().init, jax.random.key(0))
    with pytest.raises(UserError) as caught:
        init_adapters(jax.random.key(0), like, ("to_q", target), RANK)
    assert f"lora.targets: no layer's name ends in '{target}'" in str(caught.value)
    assert hint in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapted_model_has_what_its_callers_ask_a_model_for() -> None:
    model = unet()
    adapted = copy.copy(Adapted(model, 0.5))
    assert adapted.config == model.config
    assert adapted.torch_config() == model.torch_config()
    assert adapted.class_name == "UNet2DConditionModel"
    assert not hasattr(adapted, "downscale")
