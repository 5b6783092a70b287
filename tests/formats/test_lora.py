"""LoRA files: PyTorch's diffusers loads those that are written here, and what it, or kohya's scripts, wrote is read."""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from diffusers.utils import convert_state_dict_to_diffusers
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key

from offsetjax.config import default_config, presets
from offsetjax.errors import UserError
from offsetjax.formats.header import parse_header
from offsetjax.formats.lora import LoadedLora, _is_named, read_lora, write_lora
from offsetjax.formats.lora_names import kohya_names, layers, original_names
from offsetjax.formats.names import flax_tensors, to_torch
from offsetjax.formats.original_names import unet_rules
from offsetjax.formats.safetensors import NotFiniteError
from offsetjax.formats.tensors import Tensor, of_array
from offsetjax.models.family import FAMILIES
from offsetjax.models.lora import Adapted, init_adapters
from offsetjax.models.text import TextEncoder
from offsetjax.models.unet import UNet
from tests import tiny, torch_models

RANK, ALPHA = 4, 2.0
TEXT_TARGETS = ("q_proj", "out_proj", "fc1")
KOHYA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
# And all other kinds of layers, which LyCORIS and kohya's conv_dim adapt, or nobody.
TARGETS = (*KOHYA_TARGETS, "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv")
TARGETS += ("upsamplers.0.conv", "conv_in", "conv_out", "linear_1", "linear_2")
SDXL_UNET = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 48,
    "norm_num_groups": 8,
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
UNETS = {"sd1": torch_models.UNET, "sd2": torch_models.UNET | {"use_linear_projection": True}, "sdxl": SDXL_UNET}
FLOAT32 = jnp.dtype("float32")


def models(family: str) -> dict[str, Any]:
    """Our models, without weights."""
    text = default_config().model.text_encoder.to_dict() | torch_models.TEXT
    unet = UNet(default_config().model.unet.to_dict() | UNETS[family], FLOAT32)
    if family != "sdxl":
        return {"unet": unet, "text_encoder": TextEncoder(text, FLOAT32)}
    encoders = TextEncoder(text, FLOAT32, is_penultimate=True), TextEncoder(text, FLOAT32, True, has_projection=True)
    return dict(zip(("unet", "text_encoder", "text_encoder_2"), (unet, *encoders), strict=True))


@functools.cache
def bases(family: str) -> dict[str, PyTree]:
    """The shapes of their parameters."""
    return {part: jax.eval_shape(model.init, jax.random.key(0)) for part, model in models(family).items()}


def trained(family: str, rank: int = RANK, targets: tuple[str, ...] = TARGETS) -> dict[str, PyTree]:
    """Adapters of all parts, of which neither half is 0."""
    rng = np.random.default_rng(5)
    return {
        part: jax.tree.map(
            lambda array: rng.normal(0.0, 0.3, array.shape).astype(np.float32),
            init_adapters(jax.random.key(0), base, targets if part == "unet" else TEXT_TARGETS, rank),
        )
        for part, base in bases(family).items()
    }


def write(file: pathlib.Path, family: str, adapters: dict[str, PyTree], keys: str, **changes: Any) -> None:
    kohya = FAMILIES[family].files.kohya
    settings = {"family": family, "kohya": kohya, "rank": RANK, "alpha": ALPHA, "keys": keys, **changes}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_lora(file, adapters, base_like=bases(family), **settings)


def read(file: pathlib.Path, family: str) -> LoadedLora:
    return read_lora(file, bases(family), family, FAMILIES[family].files.kohya)


def names_by_kohya(family: str, part: str) -> dict[str, str]:
    return kohya_names(part, layers(bases(family)[part]), FAMILIES[family].files.kohya)


def torch_pipeline(family: str, folder: pathlib.Path) -> Any:
    """PyTorch's pipeline, with random weights; what a LoRA has no part in is the same for all."""
    unet = torch_models.unet(**UNETS[family])
    if family != "sdxl":
        return torch_models.save_pipeline(folder, unet=unet)
    plain = torch_models.save_pipeline(folder)
    second = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**torch_models.TEXT))
    return diffusers.StableDiffusionXLPipeline(
        vae=plain.vae,
        text_encoder=plain.text_encoder,
        text_encoder_2=torch_models.randomise(second),
        tokenizer=plain.tokenizer,
        tokenizer_2=plain.tokenizer,
        unet=unet,
        scheduler=plain.scheduler,
        add_watermarker=False,
    )


def torch_differences(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """By what PEFT would change the weight of each layer."""
    adapted = {name: each for name, each in module.named_modules() if isinstance(each, peft.tuners.lora.LoraLayer)}
    return {name: each.get_delta_weight(*each.active_adapters).detach().numpy() for name, each in adapted.items()}


def differences(adapters: PyTree, scale: float) -> dict[str, np.ndarray]:
    """By what our adapters change the weight of each layer, in PyTorch's layout."""
    arrays = flatten_dict(adapters)
    return {
        name: to_torch(("kernel",), scale * (arrays[*path, "down"] @ np.squeeze(arrays[*path, "up"])))
        for name, path in layers(adapters, "down").items()
    }


def assert_close(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], error: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert array.shape == ours[name].shape
        assert np.abs(ours[name] - array).max() <= error * np.abs(array).max(), name


def assert_same(ours: Mapping[str, PyTree], theirs: Mapping[str, PyTree]) -> None:
    ours, theirs = flatten_dict(ours), flatten_dict(theirs)
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert ours[path].dtype == np.float32
        np.testing.assert_array_equal(ours[path], array, err_msg=str(path))


@pytest.mark.parametrize("keys", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", UNETS)
def test_pytorch_loads_what_is_written(family: str, keys: str, tmp_path: pathlib.Path) -> None:
    adapters = trained(family)
    write(tmp_path / "lora.safetensors", family, adapters, keys)
    pipeline = torch_pipeline(family, tmp_path / "pipeline")
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    for part, tree in adapters.items():
        assert_close(differences(tree, ALPHA / RANK), torch_differences(getattr(pipeline, part)))


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_pytorchs_denoiser_with_what_is_written_predicts_as_ours(family: str, tmp_path: pathlib.Path) -> None:
    model, adapters = models(family)["unet"], trained(family)
    pipeline = torch_pipeline(family, tmp_path / "pipeline")
    tensors = {name: of_array(each.detach().numpy().copy()) for name, each in pipeline.unet.named_parameters()}
    lazy = flax_tensors(tensors, bases(family)["unet"], "test")
    base = jax.tree.map(lambda tensor: tensor(), lazy, is_leaf=lambda leaf: isinstance(leaf, Tensor))
    rng = np.random.default_rng(0)
    width = UNETS[family]["cross_attention_dim"]
    latents, hidden = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 8, 8), (2, 5, width)))
    pooled, time_ids = rng.standard_normal((2, 24)).astype(np.float32), np.full((2, 6), 512, np.float32)
    added = {"text_embeds": pooled, "time_ids": time_ids} if family == "sdxl" else None
    inputs = latents, np.array([3, 980], np.int32), hidden
    with tiny.quick_compilation(tmp_path):
        apply = jax.jit(Adapted(model, ALPHA / RANK).apply)
        ours = apply({"base": base, "adapters": adapters["unet"]}, *inputs, added)
    for keys in ("kohya", "diffusers"):
        write(tmp_path / "lora.safetensors", family, adapters, keys)
        pipeline.load_lora_weights(tmp_path / "lora.safetensors")
        with torch.no_grad():
            conditions = jax.tree.map(torch.from_numpy, added)
            theirs = pipeline.unet(*map(torch.from_numpy, inputs), added_cond_kwargs=conditions).sample.numpy()
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
        pipeline.unload_lora_weights()


@pytest.mark.parametrize("keys", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", UNETS)
def test_what_is_written_is_read_bit_for_bit(family: str, keys: str, tmp_path: pathlib.Path) -> None:
    adapters, file = trained(family), tmp_path / "new" / "lora.safetensors"
    write(file, family, adapters, keys, alpha=0.7)
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    loaded = read(file, family)
    assert (loaded.rank, loaded.alpha) == (RANK, 0.7)
    assert_same(loaded.adapters, adapters)

    write(file, family, {"unet": adapters["unet"]}, keys, dtype="bfloat16")
    assert_same(
        read(file, family).adapters,
        {"unet": jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), adapters["unet"])},
    )


def test_the_header_says_what_kohyas_readers_look_for(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "lora.safetensors"
    versions = {}
    for family in UNETS:
        write(file, family, trained(family), "kohya", dtype="float16", metadata={"ss_seed": "3", "ss_v2": "maybe"})
        with safetensors.safe_open(file, "np") as opened:
            header = opened.metadata()
            kinds = {key.rsplit(".", 1)[-1]: opened.get_tensor(key).dtype for key in opened.keys()}  # noqa: SIM118
        assert kinds == {"weight": np.float16, "alpha": np.float32}, "alpha is not rounded"
        assert header["ss_network_dim"] == "4" and header["ss_network_alpha"] == "2.0"
        assert header["ss_network_module"] == "networks.lora"
        assert (header["ss_seed"], header["ss_v2"]) == ("3", "maybe")
        versions[family] = header["ss_base_model_version"]
    assert versions == {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


def test_sdxls_layers_have_the_names_that_published_files_have() -> None:
    named = names_by_kohya("sdxl", "unet")
    down, mid, up = "down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.0"
    expected = {
        "conv_in": "input_blocks_0_0",
        "time_embedding.linear_2": "time_embed_2",
        "add_embedding.linear_1": "label_emb_0_0",
        "down_blocks.0.resnets.1.time_emb_proj": "input_blocks_2_0_emb_layers_1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
        f"{down}.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
        "mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
        f"{mid}.transformer_blocks.1.ff.net.0.proj": "middle_block_1_transformer_blocks_1_ff_net_0_proj",
        f"{up}.transformer_blocks.0.attn2.to_out.0": "output_blocks_0_1_transformer_blocks_0_attn2_to_out_0",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.1.attentions.2.proj_out": "output_blocks_5_1_proj_out",
        "up_blocks.2.resnets.2.conv2": "output_blocks_8_0_out_layers_3",
        "conv_out": "out_2",
    }
    assert {name: named[name].removeprefix("lora_unet_") for name in expected} == expected
    encoder = names_by_kohya("sdxl", "text_encoder_2")
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    assert encoder[name] == "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.mark.parametrize("family", UNETS)
def test_the_original_names_are_those_of_a_single_file(family: str) -> None:
    model = models(family)["unet"]
    rules = {rule.names: rule.original for rule in unet_rules(model.torch_config())}
    for name, original in original_names(layers(bases(family)["unet"])).items():
        assert rules[f"{name}.weight",] == f"model.diffusion_model.{original}.weight"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "counts"),
    [
        (presets.stable_diffusion_1, {"unet": 192, "text_encoder": 72}),
        (presets.stable_diffusion_xl, {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}),
    ],
)
def test_kohyas_scripts_say_that_they_adapt_as_many_layers(architecture: Callable, counts: dict[str, int]) -> None:
    config = default_config()
    architecture(config)
    for part, count in counts.items():
        section = config.model[part].to_dict()
        model = UNet(section, FLOAT32) if part == "unet" else TextEncoder(section, FLOAT32)
        base = jax.eval_shape(model.init, jax.random.key(0))
        targets = KOHYA_TARGETS if part == "unet" else (*config.lora.text_encoder_targets, "fc1", "fc2")
        new = functools.partial(init_adapters, jax.random.key(0), base, targets, RANK)
        assert len(layers(jax.eval_shape(new), "down")) == count


def test_sdxls_denoiser_is_read_by_either_naming(tmp_path: pathlib.Path) -> None:
    """Kohya's scripts write the original code's names, others with kohya's keys write diffusers'."""
    adapters, file = {"unet": trained("sdxl")["unet"]}, tmp_path / "lora.safetensors"
    write(file, "sdxl", adapters, "kohya")
    tensors = safetensors.numpy.load_file(file)
    renamed = {original: name for name, original in names_by_kohya("sdxl", "unet").items()}
    other = {}
    for key, tensor in tensors.items():
        layer, ending = key.split(".", 1)
        other[f"lora_unet_{renamed[layer].replace('.', '_')}.{ending}"] = tensor
    assert not other.keys() & tensors.keys()
    safetensors.numpy.save_file(other, file)
    assert_same(read(file, "sdxl").adapters, adapters)


@pytest.mark.parametrize("has_metadata", [True, False])
def test_what_pytorch_saves_is_read(has_metadata: bool, tmp_path: pathlib.Path) -> None:
    pipeline = torch_pipeline("sd1", tmp_path / "pipeline")
    ranks = {"rank_pattern": {"attn2.to_q": 6}, "alpha_pattern": {"attn1.to_q": 3}, "use_rslora": True}
    patterns = ranks if has_metadata else {}
    alpha = 8 if has_metadata else RANK  # without it, nothing in such a file says what alpha is
    configs = {
        "unet": peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["to_q", "to_out.0", "conv1"], **patterns),
        "text_encoder": peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["q_proj", "out_proj"]),
    }
    saved: dict[str, Any] = {}
    for part, config in configs.items():
        module = getattr(pipeline, part)
        module.add_adapter(config)
        torch_models.randomise(module)
        saved[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
        if has_metadata:
            saved[f"{part}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, **saved)
    loaded = read(tmp_path / "pytorch_lora_weights.safetensors", "sd1")
    assert loaded.rank == (6 if has_metadata else RANK)
    for part in configs:
        ours = differences(loaded.adapters[part], loaded.alpha / loaded.rank)
        assert_close(ours, torch_differences(getattr(pipeline, part)))


def rewritten(file: pathlib.Path, rename: Callable[[str], str]) -> None:
    with safetensors.safe_open(file, "np") as opened:
        header = opened.metadata()
    tensors = safetensors.numpy.load_file(file)
    new = {rename(key): tensor for key, tensor in tensors.items()}
    assert new.keys() != tensors.keys() and len(new) == len(tensors)
    safetensors.numpy.save_file(new, file, header)


@pytest.mark.parametrize(
    ("keys", "rename"),
    [
        ("diffusers", lambda key: key.replace(".text_model.", ".")),
        ("kohya", lambda key: key.replace("_text_model_", "_")),
        ("diffusers", lambda key: key.replace(".weight", ".default.weight")),
        ("diffusers", lambda key: "base_model.model." + key.replace(".weight", ".my_style.weight")),
        ("diffusers", lambda key: key.replace("unet.", "unet.base_model.model.")),
    ],
    ids=[
        "transformers from 5.6 on",
        "the same in kohya's keys",
        "PEFT's name of it",
        "PEFT's file",
        "PEFT's of a part",
    ],
)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_keys_of_newer_libraries_are_read(
    family: str, keys: str, rename: Callable[[str], str], tmp_path: pathlib.Path
) -> None:
    adapters, file = trained(family), tmp_path / "lora.safetensors"
    write(file, family, adapters, keys)
    rewritten(file, rename)
    loaded = read(file, family)
    assert (loaded.rank, loaded.alpha) == (RANK, ALPHA)
    assert_same(loaded.adapters, adapters)


@pytest.mark.parametrize("family", UNETS)
def test_the_header_names_adapted_layers_by_their_ends(family: str, tmp_path: pathlib.Path) -> None:
    """By which PEFT finds them whether or not there is a `text_model` around a text encoder's."""
    file = tmp_path / "lora.safetensors"
    some = dict(trained(family))
    one = init_adapters(jax.random.key(0), bases(family)["text_encoder"], ("layers.1.mlp.fc1",), RANK)
    for adapters in (some, some | {"text_encoder": one}):
        write(file, family, adapters, "diffusers")
        with safetensors.safe_open(file, "np") as opened:
            header = json.loads(opened.metadata()["lora_adapter_metadata"])
        for part, tree in adapters.items():
            ends = header[f"{part}.target_modules"]
            everything = layers(bases(family)[part])
            found = {name for name in everything if any(f".{name}".endswith(f".{end}") for end in ends)}
            assert found == layers(tree, "down").keys()
            assert not any("text_model" in end for end in ends)


def test_keys_that_diffusers_wrote_until_2023_are_read(tmp_path: pathlib.Path) -> None:
    adapters, file = trained("sd1", targets=("to_q", "to_out.0")), tmp_path / "lora.safetensors"
    write(file, "sd1", adapters, "diffusers", alpha=RANK)
    old, bare = {}, {}
    for key, tensor in safetensors.numpy.load_file(file).items():
        key = key.replace("lora_A", "down").replace("lora_B", "up")
        for new, former in {"to_q": "to_q", "q_proj": "to_q", "to_out.0": "to_out", "out_proj": "to_out"}.items():
            key = key.replace(
                f".{new}.", f".processor.{former}_lora." if key.startswith("unet.") else f".{former}_lora."
            )
        key = key.replace(".fc1.", ".fc1.lora_linear_layer.")
        old[key] = tensor
        if key.startswith("unet."):
            bare[key.removeprefix("unet.")] = tensor
    assert sum(".attn1.processor.to_out_lora.down.weight" in key for key in old) == 4
    assert sum(".self_attn.to_q_lora.up.weight" in key for key in old) == 2
    for tensors, expected in ((old, adapters), (bare, {"unet": adapters["unet"]})):
        safetensors.numpy.save_file(tensors, file)
        loaded = read(file, "sd1")
        assert (loaded.rank, loaded.alpha) == (RANK, RANK)
        assert_same(loaded.adapters, expected)


def test_layers_of_other_ranks_and_alphas_are_brought_to_one_and_change_nothing(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "lora.safetensors"
    write(file, "sd1", {"unet": trained("sd1", targets=("to_q", "conv1", "proj_in"))["unet"]}, "kohya")
    names = {each: name for name, each in names_by_kohya("sd1", "unet").items()}
    given, tensors, expected = safetensors.numpy.load_file(file), {}, {}
    kinds = [(RANK, ALPHA), (RANK, ALPHA), (2, 8.0), (1, 0.3)]
    for number, layer in enumerate(sorted({key.split(".")[0] for key in given})):
        rank, alpha = kinds[number % len(kinds)]
        down, up = given[f"{layer}.lora_down.weight"][:rank], given[f"{layer}.lora_up.weight"][:, :rank]
        tensors |= {f"{layer}.lora_down.weight": down.copy(), f"{layer}.lora_up.weight": up.copy()}
        tensors[f"{layer}.alpha"] = np.array(alpha, np.float32)
        product = up.reshape(up.shape[:2]) @ down.reshape(rank, -1)
        expected[names[layer]] = alpha / rank * product.reshape(len(up), *down.shape[1:])
    safetensors.numpy.save_file(tensors, file)
    loaded = read(file, "sd1")
    assert (loaded.rank, loaded.alpha) == (RANK, ALPHA)
    assert {array.shape[-1] for path, array in flatten_dict(loaded.adapters).items() if path[-1] == "down"} == {RANK}
    assert_close(differences(loaded.adapters["unet"], ALPHA / RANK), expected)


def test_a_ratio_of_scales_that_is_a_power_of_two_loses_no_bit(tmp_path: pathlib.Path) -> None:
    adapters, file = {"unet": trained("sd1", targets=("to_q",))["unet"]}, tmp_path / "lora.safetensors"
    write(file, "sd1", adapters, "kohya")
    tensors = safetensors.numpy.load_file(file)
    first = min(key for key in tensors if key.endswith(".alpha"))
    safetensors.numpy.save_file(tensors | {first: np.array(8 * ALPHA, np.float32)}, file)
    ratios = [
        {float(each) for each in np.unique(ours / theirs)}
        for ours, theirs in zip(
            jax.tree.leaves(read(file, "sd1").adapters),
            jax.tree.leaves(adapters),
            strict=True,
        )
    ]
    assert sorted(ratios, key=max) == [{1.0}] * (len(ratios) - 1) + [{8.0}]


def test_an_alpha_of_nothing_is_the_rank_and_a_1x1_convolution_may_be_a_matrix(tmp_path: pathlib.Path) -> None:
    adapters, file = {"unet": trained("sd1", targets=("to_q", "proj_in"))["unet"]}, tmp_path / "lora.safetensors"
    write(file, "sd1", adapters, "kohya")
    tensors = {
        key: array.reshape(array.shape[:2]) if "proj_in" in key else array[..., None, None]
        for key, array in safetensors.numpy.load_file(file).items()
        if not key.endswith(".alpha")
    }
    safetensors.numpy.save_file(tensors, file)
    loaded = read(file, "sd1")
    assert (loaded.rank, loaded.alpha) == (RANK, RANK)
    assert_same(loaded.adapters, adapters)


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (("to_v", "to_k", "to_q", "to_out.0"), ("to_k", "to_out.0", "to_q", "to_v")),
        (("attn2.to_q", "ff.net.2", "conv1"), ("attn2.to_q", "conv1", "net.2")),
        (("mid_block.resnets.1.conv1", "time_embedding.linear_1"), ("linear_1", "mid_block.resnets.1.conv1")),
    ],
)
def test_the_targets_of_a_file_choose_its_layers(
    targets: tuple[str, ...], found: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    adapters, file = trained("sd1", targets=targets), tmp_path / "lora.safetensors"
    write(file, "sd1", adapters, "kohya")
    loaded = read(file, "sd1")
    assert loaded.targets("unet") == found
    assert loaded.targets("text_encoder") == tuple(sorted(TEXT_TARGETS))
    again = jax.eval_shape(lambda: init_adapters(jax.random.key(0), bases("sd1")["unet"], loaded.targets("unet"), RANK))
    assert jax.tree.structure(again) == jax.tree.structure(adapters["unet"])


def test_text_encoders_that_differ_in_their_adapted_layers_have_no_targets(tmp_path: pathlib.Path) -> None:
    adapters, file = trained("sdxl"), tmp_path / "lora.safetensors"
    del adapters["text_encoder"]["text_model"]["encoder"]["layers"]["0"]["mlp"]
    write(file, "sdxl", adapters, "kohya")
    loaded = read(file, "sdxl")
    assert loaded.targets("text_encoder_2") == tuple(sorted(TEXT_TARGETS))
    with pytest.raises(UserError, match="different layers of the two text encoders"):
        loaded.targets("text_encoder", "text_encoder_2")


Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
V = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v"
REFUSED: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "a checkpoint": (
        lambda tensors: tensors.update({"first_stage_model.quant_conv.weight": np.zeros((8, 8), np.float32)}),
        r"first_stage_model\.quant_conv\.weight is of no layer of the model; is it for another family than sd1\?",
    ),
    "another family": (
        lambda tensors: tensors.update({f"lora_te1_{end}": tensors.pop(f"{Q}.{end}") for end in ("alpha",)}),
        r"lora_te1_alpha is of no layer",
    ),
    "an unknown layer": (
        lambda tensors: tensors.update({"lora_unet_mid_block_new.lora_up.weight": np.zeros((4, 4), np.float32)}),
        r"lora_unet_mid_block_new\.lora_up\.weight is of no layer of the model",
    ),
    "half of a pair": (lambda tensors: tensors.pop(f"{Q}.lora_up.weight"), r"unet\.mid_.*to_q has no up weight"),
    "other halves": (lambda tensors: tensors.pop(f"{V}.lora_down.weight"), r"to_v has no down weight"),
    "shapes": (
        lambda tensors: tensors.update({f"{Q}.lora_down.weight": np.zeros((4, 31), np.float32)}),
        r"to_q has weights of shapes \(4, 31\) and \(32, 4\), where the layer's own is \(32, 32\)",
    ),
    "ranks": (
        lambda tensors: tensors.update({f"{Q}.lora_down.weight": np.zeros((3, 32), np.float32)}),
        r"shapes \(3, 32\) and \(32, 4\)",
    ),
    "a vector": (
        lambda tensors: tensors.update({f"{Q}.lora_down.weight": np.zeros((), np.float32)}),
        r"shapes \(\) and \(32, 4\)",
    ),
    "alphas": (
        lambda tensors: tensors.update({f"{Q}.alpha": np.ones(3, np.float32)}),
        r"to_q has an alpha of shape \(3,\)",
    ),
    "no number": (
        lambda tensors: tensors.update({f"{Q}.alpha": np.array(np.nan, np.float32)}),
        r"to_q has alpha = nan",
    ),
    "both namings": (
        lambda tensors: tensors.update(
            {"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.alpha": np.ones((), np.float32)}
        ),
        r"to_q\.alpha is there by another name too",
    ),
    "nothing": (lambda tensors: tensors.clear(), r"it holds no adapters"),
    "DoRA": (
        lambda tensors: tensors.update({f"{Q}.dora_scale": np.ones((1, 32), np.float32)}),
        r"holds DoRA \(.*to_q\.dora_scale\), which is not supported; use a plain LoRA",
    ),
    "LoHa": (lambda tensors: tensors.update({f"{Q}.hada_w1_a": np.ones((32, 4), np.float32)}), r"holds LoHa"),
    "LoKr": (lambda tensors: tensors.update({f"{Q}.lokr_w1": np.ones((4, 4), np.float32)}), r"holds LoKr"),
    "LoCon": (
        lambda tensors: tensors.update({f"{Q}.lora_mid.weight": np.ones((4, 4, 3, 3), np.float32)}),
        r"holds LoCon with a Tucker decomposition",
    ),
    "biases": (
        lambda tensors: tensors.update({"unet.conv_in.lora_B.bias": np.ones(4, np.float32)}),
        r"holds LoRA with biases",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "lora.safetensors"
    write(file, "sd1", trained("sd1", targets=("to_q", "to_v")), "kohya")
    change, message = REFUSED[name]
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(UserError, match=message) as caught:
        read(file, "sd1")
    assert str(caught.value).startswith(f"lora.pretrained: {file}") and "\n" not in str(caught.value)


def test_another_familys_lora_is_refused(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "lora.safetensors"
    for keys in ("kohya", "diffusers"):
        write(file, "sdxl", trained("sdxl"), keys)
        with pytest.raises(UserError, match=r"and \d+ more; is it for another family than sd1\?"):
            read(file, "sd1")


@pytest.mark.parametrize("keep", [0, 5, 1000, -10])
def test_a_truncated_file_is_damaged(keep: int, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "lora.safetensors"
    write(file, "sd1", trained("sd1"), "diffusers")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"lora\.pretrained: .*lora\.safetensors is damaged .*; fetch it again"):
        read(file, "sd1")


@pytest.mark.parametrize("keys", ["kohya", "diffusers"])
def test_one_bit_of_any_tensor_is_told(keys: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "lora.safetensors"
    write(file, "sd1", trained("sd1"), keys)
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for entry in parse_header(whole[8:start])[0]:
        place = start + entry.begin
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError) as caught:
            read(file, "sd1")
        assert str(caught.value).startswith(f"lora.pretrained: {file} is damaged: {entry.name} differs")


@pytest.mark.parametrize("configs", ["{", "[1]", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": {"(": 1}}'])
def test_a_damaged_header_is_named(configs: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "lora.safetensors"
    write(file, "sd1", trained("sd1"), "diffusers")
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file, {"lora_adapter_metadata": configs})
    with pytest.raises(UserError, match=r"lora\.pretrained: .*lora_adapter_metadata"):
        read(file, "sd1")


@pytest.mark.parametrize(
    "pattern",
    ["(([a-z0-9_]+)+[.]*)+!", "(.*)*$", "a|b", "[", "", "\ud83d.", "." * 50_000 + "!", "to_q\n", "(?:x+x+)+y"],
)
def test_a_strangers_regular_expression_is_not_run(pattern: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "lora.safetensors"
    write(file, "sd1", trained("sd1"), "diffusers")
    configs = json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {pattern: 1}})
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file, {"lora_adapter_metadata": configs})
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"lora\.pretrained: .*is no name of a layer") as caught:
        read(file, "sd1")
    assert time.monotonic() - begin < 5 and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "pattern", ["attn1.to_q", "^mid.attn1.to_q", r"attn1\.to_q", "to_q$", "q", "^attn1.to_q", "mid"]
)
def test_a_pattern_means_what_it_does_to_peft(pattern: str) -> None:
    name = "mid.attn1.to_q"
    assert _is_named(name, pattern) == (get_pattern_key([pattern], name) == pattern)


def test_a_pickle_is_not_opened(tmp_path: pathlib.Path) -> None:
    for name in ("lora.safetensors", "pytorch_lora_weights.bin"):
        torch.save({"unet.conv_in.lora_A.weight": torch.zeros(4, 4)}, tmp_path / name)
        with pytest.raises(UserError, match=rf"{name} is a pickle, which can run code.*convert it"):
            read(tmp_path / name, "sd1")
    with pytest.raises(UserError, match=r"missing\.safetensors is missing"):
        read(tmp_path / "missing.safetensors", "sd1")


def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path: pathlib.Path) -> None:
    adapters, file = trained("sd1"), tmp_path / "lora.safetensors"
    huge = jax.tree.map(lambda array: array * 1e6, adapters)
    with pytest.raises(NotFiniteError, match="not finite in float16"):
        write(file, "sd1", huge, "kohya", dtype="float16")
