"""Single files in the original layout: diffusers' converters are the judge; they come back bit for bit."""

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from diffusers.loaders import single_file_utils as judge

from offsetjax.errors import UserError
from offsetjax.formats.names import flax_tensors
from offsetjax.formats.pretrained import open_pretrained
from offsetjax.formats.safetensors import open_file, write_tensors
from offsetjax.formats.single_file import to_diffusers, to_original, write_single_file
from offsetjax.formats.tensors import Tensor, of_array
from tests.formats import published

UNET_KEYS = {"sd1": 686, "sd2": 686, "sdxl": 1680}
TEXT_KEYS = {
    "sd1": {"cond_stage_model.": 197},
    "sd2": {"cond_stage_model.": 294},
    "sdxl": {"conditioner.embedders.0.": 197, "conditioner.embedders.1.": 390},
}
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}


@pytest.fixture(scope="module", params=published.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(family: str) -> dict[str, torch.nn.Module]:
    return published.random_models(family)


@pytest.fixture(scope="module")
def file(family: str, models: dict[str, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What we write of PyTorch's models."""
    path = tmp_path_factory.mktemp(family) / "model.safetensors"
    write_single_file(path, parts_of(models), published.configs(family, narrow=True), family)
    return path


def parts_of(models: Mapping[str, torch.nn.Module]) -> dict[str, dict[str, Tensor]]:
    return {part: published.tensors(model) for part, model in models.items()}


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        found, wanted = actual[name](), tensor()
        assert found.dtype == wanted.dtype == actual[name].dtype and found.shape == wanted.shape == actual[name].shape
        assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(wanted).tobytes(), name


def test_diffusers_converters_give_pytorchs_weights(
    family: str, models: dict[str, torch.nn.Module], file: pathlib.Path
) -> None:
    checkpoint = safetensors.torch.load_file(file)
    converted = {
        "unet": judge.convert_ldm_unet_checkpoint(dict(checkpoint), models["unet"].config),
        "vae": judge.convert_ldm_vae_checkpoint(dict(checkpoint), models["vae"].config),
    }
    for part in models.keys() - converted:
        is_open_clip = part == "text_encoder_2" or family == "sd2"
        converted[part] = (
            judge.convert_open_clip_checkpoint(models[part], checkpoint, prefix=OPEN_CLIP[family])
            if is_open_clip
            else judge.convert_ldm_clip_checkpoint(checkpoint)
        )
    for part, model in models.items():
        expected, found = model.state_dict(), converted[part]
        positions = found.pop("text_model.embeddings.position_ids", None)
        assert positions is None or (positions.dtype == torch.int64 and positions.tolist() == [list(range(77))])
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_what_is_written_is_read_again(family: str, models: dict[str, torch.nn.Module], file: pathlib.Path) -> None:
    pretrained = open_pretrained(file)
    assert (pretrained.family, pretrained.layout) == (family, "single_file")
    for part, expected in parts_of(models).items():
        assert pretrained.has(part)
        assert_same(pretrained.tensors(part), expected)


@pytest.mark.parametrize("dtype", TORCH)
def test_a_file_is_exported_as_it_was_imported(dtype: str, family: str, tmp_path: pathlib.Path) -> None:
    """With what no part holds: the layer that Stable Diffusion 2 does not use, the scale of CLIP's similarities."""
    parts = parts_of(published.random_models(family, TORCH[dtype]))
    original = to_original(parts, published.configs(family, narrow=True), family)
    rng = np.random.default_rng(0)
    for name in original:
        if re.search(r"resblocks\.23\.|cond_stage_model\.model\.text_projection|logit_scale", name):
            values = rng.normal(size=original[name].shape).astype(np.float32)
            original[name] = of_array(values.astype(original[name].dtype))
    write_tensors(tmp_path / "before.safetensors", original, metadata={"format": "pt"})
    pretrained = open_pretrained(tmp_path / "before.safetensors")
    assert len(pretrained.carried()) == {"sd1": 0, "sd2": 14, "sdxl": 1}[family]
    read = {part: pretrained.tensors(part) for part in parts}
    configs = {part: pretrained.read_config(part) for part in (*parts, "scheduler")}
    write_single_file(tmp_path / "after.safetensors", read, configs, family, pretrained.carried())
    assert (tmp_path / "after.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()


def test_the_published_sizes_have_the_published_names(family: str) -> None:
    """Every tensor of the published files, of models without values; the shapes give the architecture back."""
    configs = published.configs(family, narrow=False)
    with torch.device("meta"):
        parts = {part: published.abstract_tensors(m) for part, m in published.models(family, narrow=False).items()}
    original = to_original(parts, configs, family)
    counts = {"model.diffusion_model.": UNET_KEYS[family], "first_stage_model.": 248, **TEXT_KEYS[family]}
    assert {prefix: sum(name.startswith(prefix) for name in original) for prefix in counts} == counts
    assert len(original) == sum(counts.values())
    back = to_diffusers(original, configs, family)
    for part, tensors in parts.items():
        assert {name: t.shape for name, t in back[part].items()} == {name: t.shape for name, t in tensors.items()}


def test_the_architecture_follows_from_the_shapes(
    family: str, models: dict[str, torch.nn.Module], file: pathlib.Path
) -> None:
    pretrained = open_pretrained(file)
    for part, config in published.configs(family, narrow=True).items():
        found = pretrained.read_config(part)
        depths = found.pop("transformer_layers_per_block", None)
        assert depths == {"sdxl": [1, 2, 3]}.get(family, [1, 1, 1, 1]) or part != "unet"
        expected = {key: value for key, value in config.items() if not key.startswith("transformer_layers")}
        found["sample_size"] = expected["sample_size"] = 0
        assert {key: found[key] for key in expected} == expected
        if part in ("unet", "vae"):  # and no other setting is one of which PyTorch's model says otherwise
            theirs = dict(models[part].config)
            ours = type(models[part]).from_config(found).config
            unimportant = {"sample_size", "transformer_layers_per_block", "mid_block_type"}
            assert {key for key in ours if key[0] != "_" and theirs[key] != ours[key]} <= unimportant
    scheduler = pretrained.read_config("scheduler")
    assert getattr(diffusers, scheduler["_class_name"]).from_config(scheduler).config["beta_end"] == 0.012
    name = {"sdxl": "StableDiffusionXLPipeline"}.get(family, "StableDiffusionPipeline")
    assert pretrained.read_config("model_index")["_class_name"] == name
    size = {"sd1": 64, "sd2": 96, "sdxl": 128}[family]  # the weights drawn for 2.x are such as predict v
    assert pretrained.read_config("unet")["sample_size"] == size


def changed(
    file: pathlib.Path, out: pathlib.Path, change: Callable[[dict[str, np.ndarray]], None], **header: str
) -> pathlib.Path:
    """A copy of a file after `change`."""
    tensors = {name: tensor() for name, tensor in open_file(file, "test")[0].items()}
    change(tensors)
    safetensors.numpy.save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, out, header or None)
    return out


def nothing(_: dict[str, np.ndarray]) -> None:
    pass


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_file(tmp_path_factory.mktemp("small"), "sd1")


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_file(tmp_path_factory.mktemp("small"), "sd2")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_file(tmp_path_factory.mktemp("small"), "sdxl")


def small_file(folder: pathlib.Path, family: str) -> pathlib.Path:
    """Of models in half precision, which are quicker to copy."""
    parts = parts_of({part: model.half() for part, model in published.models(family).items()})
    write_single_file(folder / f"{family}.safetensors", parts, published.configs(family, narrow=True), family)
    return folder / f"{family}.safetensors"


def test_diffusers_loads_the_file(sdxl: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Its own way from a file to a model, which needs to be told the architecture alone."""
    pretrained = open_pretrained(sdxl)
    for part, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(pretrained.read_config(part)))
        options = {"config": str(tmp_path), "subfolder": part, "local_files_only": True, "torch_dtype": torch.float16}
        assert_same(published.tensors(kind.from_single_file(str(sdxl), **options)), pretrained.tensors(part))


BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def spread(tensors: dict[str, np.ndarray]) -> None:
    tensors[BIAS] = np.linspace(-0.3, 0.3, tensors[BIAS].size).astype(np.float16)


@pytest.mark.parametrize(
    ("change", "header", "prediction_type"),
    [
        (nothing, {}, "epsilon"),
        (spread, {}, "v_prediction"),
        (spread, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        (spread, {"ss_v_parameterization": "False"}, "epsilon"),
        (nothing, {"ss_v_parameterization": "True"}, "v_prediction"),
        (nothing, {"modelspec.prediction_type": "v", "ss_v_parameterization": "False"}, "v_prediction"),
    ],
)
def test_what_a_model_predicts_is_in_its_header_or_its_weights(
    change: Callable, header: dict, prediction_type: str, sd2: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    pretrained = open_pretrained(changed(sd2, tmp_path / "m.safetensors", change, **header))
    assert pretrained.read_config("scheduler")["prediction_type"] == prediction_type
    assert pretrained.read_config("unet")["sample_size"] == {"epsilon": 64, "v_prediction": 96}[prediction_type]
    assert pretrained.metadata() == header


def test_a_velocity_model_of_xl_is_marked_and_known_by_its_mark(sdxl: pathlib.Path, tmp_path: pathlib.Path) -> None:
    plain = open_pretrained(sdxl)
    parts = {part: plain.tensors(part) for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
    configs: dict[str, Any] = {part: plain.read_config(part) for part in (*parts, "scheduler")}
    assert not configs["scheduler"]["rescale_betas_zero_snr"]
    for zero_terminal_snr in (False, True):
        configs["scheduler"] |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_terminal_snr}
        write_single_file(tmp_path / "m.safetensors", parts, configs, "sdxl")
        names = safetensors.safe_open(tmp_path / "m.safetensors", "np").keys()
        assert "v_pred" in names and ("ztsnr" in names) == zero_terminal_snr
        scheduler = open_pretrained(tmp_path / "m.safetensors").read_config("scheduler")
        assert scheduler["prediction_type"] == "v_prediction"
        assert scheduler["rescale_betas_zero_snr"] == zero_terminal_snr


def test_the_made_up_last_layer_changes_nothing(sd2: pathlib.Path) -> None:
    """x + attention(norm(x)) and x + mlp(norm(x)) are x where the last matrix and bias of each are 0."""
    tensors = open_file(sd2, "test")[0]
    block = "cond_stage_model.model.transformer.resblocks.23"
    for name in ("attn.out_proj.weight", "attn.out_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"):
        assert not tensors[f"{block}.{name}"]().any()
    scale = tensors["cond_stage_model.model.logit_scale"]()
    assert scale.shape == () and np.exp(np.float64(scale)) == pytest.approx(100, rel=0.01)
    np.testing.assert_array_equal(tensors["cond_stage_model.model.text_projection"](), np.eye(64))


def test_what_training_leaves_behind_is_passed_over_and_counted(sd1: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def leave(tensors: dict[str, np.ndarray]) -> None:
        tensors |= {name: np.zeros(3, np.float32) for name in ("betas", "sqrt_recipm1_alphas_cumprod", "logvar")}
        tensors["model_ema.diffusion_modelinput_blocks00weight"] = np.zeros(3, np.float32)
        tensors["cond_stage_model.logit_scale"] = np.zeros((), np.float32)

    pretrained = open_pretrained(changed(sd1, tmp_path / "m.safetensors", leave))
    assert len(pretrained.ignored()) == 4
    assert_same(pretrained.tensors("unet"), open_pretrained(sd1).tensors("unet"))
    assert open_pretrained(sd1).ignored() == ()


def test_files_of_newer_transformers_lack_one_module(sd1: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("cond_stage_model.")]:
            tensors[name.replace(".text_model.", ".")] = tensors.pop(name)

    pretrained = open_pretrained(changed(sd1, tmp_path / "m.safetensors", rename))
    assert_same(pretrained.tensors("text_encoder"), open_pretrained(sd1).tensors("text_encoder"))


def test_a_part_that_is_not_there_is_named(sd1: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("first_stage_model.")]:
            del tensors[name]

    pretrained = open_pretrained(changed(sd1, tmp_path / "m.safetensors", drop))
    assert pretrained.has("text_encoder") and not pretrained.has("vae")
    with pytest.raises(UserError, match=r"m\.safetensors holds no vae; "):
        pretrained.tensors("vae")


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
LABEL = "model.diffusion_model.label_emb.0.0.weight"
REFINER = "conditioner.embedders.0.model.ln_final.bias"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 8)}, r"is a LoRA, not a model; .*lora\.pretrained"),
        ({"unet.down_blocks.0.attn1.to_q.lora_A.weight": (4, 8)}, r"is a LoRA, not a model"),
        ({"down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)}, r"is one part of a diffusers directory"),
        ({"model.diffusion_model.joint_blocks.0.x": (4,)}, r"is not one of the supported families \(Stable Diffusion"),
        ({"model.diffusion_model.double_blocks.0.x": (4,)}, r"is not one of the supported families"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (4,)}, r"is not one of the supported families"),
        ({CONV_IN: (32, 4, 3, 3), "edm_mean": (4,)}, r"is not one of the supported families"),
        ({CONV_IN: (32, 4, 3, 3), LABEL: (8, 8), REFINER: (8,)}, r"is the refiner of SDXL"),
        ({CONV_IN: (32, 9, 3, 3), "model.diffusion_model.out.2.weight": (4, 32, 3, 3)}, r"9 input channels"),
        ({CONV_IN: (32, 4, 3, 3)}, r"out\.2\.weight is missing; is it a whole model"),
        ({CONV_IN: (32,)}, r"its tensors have unknown shapes"),
    ],
)
def test_what_is_no_model_of_a_known_family_is_refused(tensors: dict, message: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, file)
    with pytest.raises(UserError, match=message) as caught:
        open_pretrained(file)
    assert str(caught.value).startswith(f"model.pretrained: {file}") and "\n" not in str(caught.value)


def test_missing_extra_and_misshapen_tensors_are_named(sdxl: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def harm(tensors: dict[str, np.ndarray]) -> None:
        tensors.pop("first_stage_model.quant_conv.bias")
        tensors["conditioner.embedders.2.weight"] = np.zeros(3, np.float32)
        tensors["first_stage_model.encoder.mid.attn_1.q.weight"] = np.zeros((64, 64, 3, 3), np.float32)
        tensors["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"] = np.zeros(100, np.float32)

    with pytest.raises(UserError) as caught:
        open_pretrained(changed(sdxl, tmp_path / "m.safetensors", harm))
    message = str(caught.value)
    assert "\n" not in message and "m.safetensors as a model of Stable Diffusion XL: " in message
    assert "first_stage_model.quant_conv.bias is missing" in message
    assert "conditioner.embedders.2.weight is not part of the model" in message
    assert "first_stage_model.encoder.mid.attn_1.q.weight: shape (64, 64, 3, 3)" in message
    assert "resblocks.0.attn.in_proj_bias: shape (100,)" in message


def test_a_wrong_shape_is_named_when_it_meets_the_model(sd1: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def harm(tensors: dict[str, np.ndarray]) -> None:
        tensors["first_stage_model.decoder.mid.block_1.conv1.weight"] = np.zeros((64, 64, 1, 1), np.float16)

    pretrained = open_pretrained(changed(sd1, tmp_path / "m.safetensors", harm))
    like = {"decoder": {"mid_block": {"resnets_0": {"conv1": {"kernel": np.zeros((3, 3, 64, 64))}}}}}
    name = "decoder.mid_block.resnets.0.conv1.weight"
    with pytest.raises(UserError, match=rf"vae: {re.escape(name)} has shape \(64, 64, 1, 1\), not \(64, 64, 3, 3\)"):
        flax_tensors({name: pretrained.tensors("vae")[name]}, like, "vae")


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "model.bin"])
def test_a_pickle_is_not_opened(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match=r"is a pickle, .*convert it to safetensors, .*from_"):
        open_pretrained(tmp_path / name)


def test_an_autoencoder_without_attention_has_no_original_layout(sd1: pathlib.Path) -> None:
    configs = published.configs("sd1", narrow=True)
    configs["vae"]["mid_block_add_attention"] = False
    with pytest.raises(UserError, match="export a diffusers directory"):
        to_original({"vae": open_pretrained(sd1).tensors("vae")}, configs, "sd1")


LAST_LAYER = "cond_stage_model.model.transformer.resblocks.23."


@pytest.mark.parametrize("more", [(), ("text_projection", "logit_scale")])
def test_a_text_encoder_of_2_may_come_without_the_layer_that_is_not_used(
    more: tuple[str, ...], sd2: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            if name.startswith(LAST_LAYER) or name.removeprefix("cond_stage_model.model.") in more:
                del tensors[name]

    pretrained = open_pretrained(changed(sd2, tmp_path / "m.safetensors", drop))
    assert pretrained.read_config("text_encoder")["num_hidden_layers"] == 23
    assert_same(pretrained.tensors("text_encoder"), open_pretrained(sd2).tensors("text_encoder"))


@pytest.mark.parametrize("layers", [22, 25])
def test_a_text_encoder_of_2_with_other_layers_is_refused(
    layers: int, sd2: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith(LAST_LAYER)]:
            tensors[name.replace(".23.", ".24.")] = tensors[name]
            if layers == 22:
                del tensors[name], tensors[name.replace(".23.", ".24.")], tensors[name.replace(".23.", ".22.")]

    with pytest.raises(UserError, match=rf"of {layers} layers, where Stable Diffusion 2's has 24, or 23 without the l"):
        open_pretrained(changed(sd2, tmp_path / "m.safetensors", change))


def renamed(*pairs: tuple[str, str]) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            new = name
            for old, other in pairs:
                new = new.replace(old, other)
            tensors[new] = tensors.pop(name)

    return change


SGM = ("cond_stage_model.", "conditioner.embedders.0.")
WITHOUT_MODULE = (".text_model.", ".")


@pytest.mark.parametrize(
    ("family", "pairs"),
    [("sd1", (SGM,)), ("sd1", (SGM, WITHOUT_MODULE)), ("sd2", (SGM,)), ("sdxl", (WITHOUT_MODULE,))],
    ids=["1.x as sgm writes it", "without a module", "2.x as sgm writes it", "XL without a module"],
)
def test_text_encoders_go_by_several_names(
    family: str, pairs: tuple, request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> None:
    file = request.getfixturevalue(family)
    pretrained, plain = (
        open_pretrained(changed(file, tmp_path / "m.safetensors", renamed(*pairs))),
        open_pretrained(file),
    )
    assert pretrained.family == family
    for part in ("text_encoder", "text_encoder_2")[: 1 + (family == "sdxl")]:
        assert_same(pretrained.tensors(part), plain.tensors(part))
    assert pretrained.carried().keys() == plain.carried().keys()


def test_a_projection_may_be_that_of_a_linear_layer(sdxl: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        name = "conditioner.embedders.1.model.text_projection"
        tensors[f"{name}.weight"] = tensors.pop(name).T

    pretrained = open_pretrained(changed(sdxl, tmp_path / "m.safetensors", change))
    assert_same(pretrained.tensors("text_encoder_2"), open_pretrained(sdxl).tensors("text_encoder_2"))


def test_a_tensor_of_two_names_is_refused(sd1: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
        tensors[name.replace(".text_model", "")] = tensors[name]

    with pytest.raises(UserError, match=r"final_layer_norm\.bias by another name too"):
        open_pretrained(changed(sd1, tmp_path / "m.safetensors", change))


@pytest.mark.parametrize(
    ("family", "part", "key", "value"),
    [
        ("sd1", "unet", "attention_head_dim", (1, 3, 3, 3)),
        ("sd1", "unet", "norm_num_groups", 16),
        ("sd1", "unet", "freq_shift", 1),
        ("sd1", "unet", "norm_eps", 1e-6),
        ("sd1", "vae", "norm_num_groups", 8),
        ("sd1", "vae", "scaling_factor", 0.5),
        ("sd1", "text_encoder", "hidden_act", "gelu"),
        ("sd1", "text_encoder", "num_attention_heads", 2),
        ("sd1", "text_encoder", "layer_norm_eps", 1e-6),
        ("sd1", "scheduler", "beta_end", 0.02),
        ("sd1", "scheduler", "num_train_timesteps", 100),
        ("sd1", "scheduler", "prediction_type", "v_prediction"),  # which neither header nor tensor says here
        ("sdxl", "unet", "attention_head_dim", (1, 1, 1)),
        ("sdxl", "text_encoder_2", "hidden_act", "quick_gelu"),
    ],
)
def test_what_a_file_cannot_say_is_not_written(
    family: str, part: str, key: str, value: Any, request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> None:
    pretrained = open_pretrained(request.getfixturevalue(family))
    configs = {name: pretrained.read_config(name) for name in (*pretrained.source.parts, "scheduler")}
    parts = {name: pretrained.tensors(name) for name in pretrained.source.parts}
    configs[part] = configs[part] | {key: value}
    with pytest.raises(UserError, match=rf"cannot say that {part} has {key} = .*; use --format=diffusers"):
        write_single_file(tmp_path / "m.safetensors", parts, configs, family)
    assert not list(tmp_path.iterdir())


def test_heads_of_blocks_that_do_not_attend_need_not_be_said(sdxl: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pretrained = open_pretrained(sdxl)
    configs = {part: pretrained.read_config(part) for part in pretrained.source.parts}
    first, *others = configs["unet"]["attention_head_dim"]
    configs["unet"] |= {"attention_head_dim": (first + 4, *others), "transformer_layers_per_block": (7, 2, 3)}
    parts = {part: pretrained.tensors(part) for part in configs}
    write_single_file(tmp_path / "m.safetensors", parts, configs, "sdxl")
    assert_same(open_pretrained(tmp_path / "m.safetensors").tensors("unet"), pretrained.tensors("unet"))


def test_a_text_encoder_of_2_with_other_layers_is_not_written(sd2: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pretrained = open_pretrained(sd2)
    configs = {part: pretrained.read_config(part) for part in pretrained.source.parts}
    configs["text_encoder"]["num_hidden_layers"] = 12
    parts = {part: pretrained.tensors(part) for part in configs}
    with pytest.raises(UserError, match=r"has a text encoder of 13 layers, .*; use --format=diffusers"):
        write_single_file(tmp_path / "m.safetensors", parts, configs, "sd2")
