"""Tensors that are not read, headers and names, of any shape and any depth: each way there has its way back."""

import contextlib
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import assume, example, given
from hypothesis import strategies as st

from offsetjax.errors import UserError
from offsetjax.formats import dit_names, lora_names
from offsetjax.formats.flux2_names import FLUX2
from offsetjax.formats.header import Entry, format_header, parse_header
from offsetjax.formats.layout import PREFIX, Layout
from offsetjax.formats.names import flax_tensors, from_torch, to_torch, torch_name, torch_tensors
from offsetjax.formats.original_names import UNET, Rule, clip_rules, open_clip_rules, unet_rules, vae_rules
from offsetjax.formats.safetensors import open_file, write_tensors
from offsetjax.formats.tensors import Tensor, cast, concatenated, of_array, rows, transposed, with_ndim
from offsetjax.formats.z_image_names import Z_IMAGE
from offsetjax.models.family import FAMILIES
from tests.properties import checked, each_count

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def numbered(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


# Lazy tensors against numpy.


def _changed(data: Any, tensor: Tensor, array: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """One change of both, drawn."""
    changes = ["cast", "transposed", "with_ndim", *(["rows", "concatenated"] if array.ndim else [])]
    match data.draw(st.sampled_from(changes)):
        case "cast":
            dtype = np.dtype(data.draw(st.sampled_from([np.float32, np.float16, np.int32, ml_dtypes.bfloat16])))
            return cast(tensor, dtype), array.astype(dtype)
        case "transposed":
            axes = data.draw(st.permutations(range(array.ndim)))
            return transposed(tensor, axes), array.transpose(axes)
        case "with_ndim":
            least = array.ndim
            while least and array.shape[least - 1] == 1:
                least -= 1
            ndim = data.draw(st.integers(least, 5))
            shape = array.shape[:ndim] + (1,) * (ndim - array.ndim)
            return with_ndim(tensor, ndim), array.reshape(shape)
        case "rows":
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, array.shape[0])] * 2)))
            return rows(tensor, start, stop), array[start:stop]
        case _:
            parts = data.draw(st.lists(st.integers(0, array.shape[0]), max_size=3).map(sorted))
            bounds = [0, *parts, array.shape[0]]
            return concatenated([rows(tensor, *each) for each in itertools.pairwise(bounds)]), array


def _slices(data: Any, shape: tuple[int, ...]) -> tuple[slice, ...]:
    bound = st.none() | st.integers(-6, 6)
    count = data.draw(st.integers(0, len(shape)))
    return tuple(slice(*data.draw(st.tuples(bound, bound))) for _ in range(count))


@each_count
def test_a_lazy_tensor_reads_what_numpy_would(count: int) -> None:
    @checked(count)
    @given(SHAPES, st.integers(0, 5), st.data())
    def holds(shape: tuple[int, ...], num_changes: int, data: Any) -> None:
        array = numbered(shape)
        tensor = of_array(array)
        for _ in range(num_changes):
            tensor, array = _changed(data, tensor, array)
        assert (tensor.shape, tensor.dtype, tensor.size, tensor.nbytes) == (
            array.shape,
            array.dtype,
            array.size,
            array.nbytes,
        )
        index = _slices(data, array.shape)
        np.testing.assert_array_equal(tensor.read(index), array[(..., *index)] if not index else array[index])
        np.testing.assert_array_equal(tensor(), array, strict=True)

    holds()


# Headers and files.

NAMES = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: ".." not in name and not set(name) & set("/\\") and name != "__metadata__"
)
ARRAYS = st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=5)
METADATA = st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)


@each_count
def test_what_is_written_is_read_by_us_and_by_the_library(count: int, tmp_path: pathlib.Path) -> None:
    @checked(count)
    @given(ARRAYS, METADATA)
    def holds(described: dict[str, tuple[tuple[int, ...], str]], metadata: dict[str, str]) -> None:
        arrays = {name: numbered(shape, np.dtype(dtype)) for name, (shape, dtype) in described.items()}
        file = tmp_path / "any.safetensors"
        write_tensors(file, {name: of_array(array) for name, array in arrays.items()}, metadata=metadata)
        tensors, read = open_file(file, "here")
        library = safetensors.numpy.load_file(file)
        assert read == metadata and tensors.keys() == library.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(tensors[name](), array, strict=True)
            np.testing.assert_array_equal(library[name], array, strict=True)

    holds()


def _entries(described: dict[str, tuple[tuple[int, ...], str]]) -> list[Entry]:
    end, entries = 0, []
    for name, (shape, dtype) in described.items():
        begin, end = end, end + numbered(shape).size * np.dtype(dtype).itemsize
        entries.append(Entry(name, np.dtype(dtype), shape, begin, end))
    return entries


@each_count
def test_a_header_comes_back_and_a_changed_byte_never_ends_in_another_error(count: int) -> None:
    @checked(count)
    @given(ARRAYS, METADATA, st.data())
    def holds(described: dict[str, tuple[tuple[int, ...], str]], metadata: dict[str, str], data: Any) -> None:
        entries = _entries(described)
        written = format_header(entries, metadata)
        text = written[8:]
        assert int.from_bytes(written[:8], "little") == len(text) and len(text) % 8 == 0
        found, told = parse_header(text)
        # Tensors of no bytes begin where another does: their order is not said.
        assert sorted(found, key=repr) == sorted(entries, key=repr) and told == metadata
        assume(text)
        place, byte = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(0, 255))
        broken = text[:place] + bytes([byte]) + text[place + 1 :]
        for damaged in (broken, text[:place], text + broken):
            with contextlib.suppress(ValueError):
                parse_header(damaged)

    holds()


def _opened(file: pathlib.Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, or the line with which it is refused."""
    try:
        return open_file(file, "model.pretrained")[0], ""
    except UserError as error:
        return {}, str(error)


@each_count
def test_a_damaged_file_is_refused_in_one_line(count: int, tmp_path: pathlib.Path) -> None:
    @checked(count)
    @given(st.binary(max_size=64), st.integers(0, 300), st.sampled_from(["cut", "begun", "inside"]))
    @example(b"\xff\xff\xff\xff\xff\xff\xff\x7f", 0, "begun")
    @example(b"\x08\0\0\0\0\0\0\0null    ", 0, "begun")
    def holds(noise: bytes, place: int, how: str) -> None:
        whole = safetensors.numpy.save({"a": numbered((3, 4)), "b": numbered((2,))}, {"format": "pt"})
        cut = place % len(whole)
        file = tmp_path / "damaged.safetensors"
        damaged = {
            "cut": whole[:cut],
            "begun": noise,
            "inside": whole[:cut] + noise + whole[cut:],
        }[how]
        file.write_bytes(damaged)
        tensors, message = _opened(file)
        if message:
            assert message.startswith("model.pretrained: ") and "\n" not in message
            return
        library = safetensors.numpy.load(damaged)  # then the library takes it too, with the same content
        assert tensors.keys() == library.keys()
        for name, array in library.items():
            np.testing.assert_array_equal(tensors[name](), array, strict=True)

    holds()


# Flax's paths and PyTorch's names.

MODULES = st.builds(
    "{}_{}".format,
    st.sampled_from(["down_blocks", "resnets", "attentions", "layers", "net", "transformer_blocks"]),
    st.integers(0, 120),
) | st.sampled_from(
    [
        "mid_block",
        "encoder",
        "text_model",
        "attn1",
        "to_q",
        "q_proj",
        "conv1",
        "norm1",
        "linear_1",
        "linear_2",
        "wi_0",
        "wi_1",
        "proj_out_1",
        "proj_out_2",
        "time_embedding",
        "query",
        "key",
        "value",
        "proj_attn",
    ]
)
LEAVES = st.sampled_from(["kernel", "embedding", "scale", "bias"])
PATHS = st.lists(st.tuples(st.lists(MODULES, min_size=1, max_size=5), LEAVES), min_size=1, max_size=8).map(
    lambda pairs: sorted({(*modules, leaf) for modules, leaf in pairs})
)
ONE_WEIGHT = {"kernel", "embedding", "scale"}  # a module has no two of them
OLD = {"query": "to_q", "key": "to_k", "value": "to_v"}


def _is_a_network(paths: list[tuple[str, ...]]) -> bool:
    """Whether no leaf is a module too, and no module has two weights or two attentions' names for one thing."""
    modules = [path[:-1] for path in paths if path[-1] in ONE_WEIGHT]
    same = {tuple(OLD.get(module, module) for module in path) for path in modules}
    return len(same) == len(modules)


@each_count
def test_any_tree_of_parameters_has_names_of_its_own_and_comes_back(count: int) -> None:
    @checked(count)
    @given(PATHS, st.data())
    def holds(paths: list[tuple[str, ...]], data: Any) -> None:
        assume(_is_a_network(paths))
        flat = {}
        for number, path in enumerate(paths):
            ndim = data.draw(st.sampled_from([2, 4])) if path[-1] == "kernel" else 2 if path[-1] == "embedding" else 1
            flat[path] = numbered((2, 3, 4, 5)[:ndim]) + number
        tree = unflatten_dict(flat)
        tensors = torch_tensors(tree)
        assert len(tensors) == len(flat), "two parameters of one name"
        back = flatten_dict(flax_tensors(tensors, tree, "test"))
        for path, array in flat.items():
            np.testing.assert_array_equal(back[path](), array, strict=True)
            np.testing.assert_array_equal(tensors[torch_name(path)](), to_torch(path, array), strict=True)
            np.testing.assert_array_equal(from_torch(path, to_torch(path, array)), array, strict=True)

    holds()


# The original layout of Stable Diffusion, for any number of blocks and layers.


@st.composite
def unets(draw: Callable[..., Any]) -> dict[str, Any]:
    widths = draw(st.lists(st.sampled_from([32, 64, 96]), min_size=1, max_size=5))
    crosses = draw(st.lists(st.booleans(), min_size=len(widths), max_size=len(widths)))
    crosses[-1] = True if not any(crosses) else crosses[-1]
    return {
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if crosses_ else "DownBlock2D" for crosses_ in crosses],
        "up_block_types": ["CrossAttnUpBlock2D" if crosses_ else "UpBlock2D" for crosses_ in crosses[::-1]],
        "layers_per_block": draw(st.integers(1, 3)),
        "transformer_layers_per_block": draw(st.integers(1, 3) | st.just([1 + i % 3 for i in range(len(widths))])),
        "addition_embed_type": draw(st.sampled_from(["", "text_time"])),
    }


def _check_rules(rules: list[Rule], height: int = 6) -> None:
    """Each name once on either side, and tensors there and back."""
    names = [name for rule in rules for name in rule.names]
    assert len(set(names)) == len(names) and len({rule.original for rule in rules}) == len(rules)
    for rule in rules:
        shape = (height, 4) if rule.change else (height, 4, 3)
        held = {name: of_array(numbered(shape) + place) for place, name in enumerate(rule.names)}
        original = rule.to_original(held)
        back = rule.to_diffusers(original)
        assert back.keys() == held.keys() and len(original.shape) == (4 if rule.change == "convolution" else len(shape))
        for name, tensor in held.items():
            np.testing.assert_array_equal(back[name](), tensor(), strict=True)


@each_count
def test_the_original_layout_of_any_model_is_a_renaming(count: int) -> None:
    @checked(count)
    @given(unets(), st.integers(1, 6), st.booleans())
    def holds(config: dict[str, Any], num_layers: int, has_projection: bool) -> None:
        _check_rules(list(unet_rules(config)))
        _check_rules(list(vae_rules(config)))
        text = {"num_hidden_layers": num_layers}
        _check_rules(list(clip_rules(text, "cond_stage_model.")))
        _check_rules(list(open_clip_rules(text, "conditioner.", has_projection)))

    holds()


@each_count
def test_loras_name_any_denoisers_layers_as_its_files_do(count: int) -> None:
    """The layers' original names are written twice: by rules from a config, and from the names that are there."""

    @checked(count)
    @given(unets())
    def holds(config: dict[str, Any]) -> None:
        layers = {
            name.removesuffix(".weight"): rule.original.removeprefix(UNET).removesuffix(".weight")
            for rule in unet_rules(config)
            for name in rule.names
            if name.endswith(".weight") and "norm" not in name.split(".")[-2]
        }
        assert lora_names.original_names(layers) == layers
        for family in ("sd1", "sdxl"):
            kohya = lora_names.kohya_names("unet", layers, FAMILIES[family].files.kohya)
            assert len(set(kohya.values())) == len(layers), "two layers of one name"
            known = lora_names.known_names("unet", layers, FAMILIES[family].files.kohya)
            for name in layers:
                assert known[kohya[name]] == known[name] == known[f"unet.{name}"] == name

    holds()


# Layouts by rules with a block's number, and a DiT's copies.


def _named(layout: Layout, blocks: list[int]) -> dict[str, Tensor]:
    """A tensor for each name that a model of these blocks may have in diffusers."""
    names = {
        name.format(block)
        for rule in layout.rules
        for name in rule.diffusers
        for block in (blocks if "{}" in name else [""])
    }
    return {name: of_array(numbered((2, 3)) + place) for place, name in enumerate(sorted(names))}


@each_count
def test_the_original_layouts_of_transformers_come_back_at_any_depth(count: int) -> None:
    @checked(count)
    @given(st.sampled_from([FLUX2, Z_IMAGE]), st.sets(st.integers(0, 200), min_size=1, max_size=5), st.booleans())
    def holds(layout: Layout, blocks: set[int], has_prefix: bool) -> None:
        tensors = _named(layout, sorted(blocks))
        original = layout.to_original(tensors)
        prefix = PREFIX if has_prefix else ""
        back = layout.to_diffusers({prefix + name: tensor for name, tensor in original.items()}, "test")
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(back[name](), tensor(), strict=True)

    holds()


@each_count
def test_a_dits_copies_are_one_again(count: int) -> None:
    @checked(count)
    @given(st.sets(st.integers(0, 60), min_size=1, max_size=6))
    def holds(blocks: set[int]) -> None:
        names = ["emb.timestep_embedder.linear_1.weight", "emb.linear.bias", "pos_embed.proj.weight", "proj_out_1.bias"]
        names += [
            f"transformer_blocks.{block}.{name}" for block in blocks for name in ("norm1.linear.weight", "ff.bias")
        ]
        tensors = {name: of_array(numbered((2, 2)) + place) for place, name in enumerate(names)}
        theirs = dit_names.to_diffusers(tensors)
        embedding = [name for name in names if name.startswith("emb.")]
        own = {f"transformer_blocks.{block}.norm1.{name}": name for block in blocks for name in embedding}
        own |= {name: name for name in names if name not in embedding}
        assert theirs.keys() == own.keys()
        for name, tensor in theirs.items():
            np.testing.assert_array_equal(tensor(), tensors[own[name]](), strict=True)
        back = dit_names.from_diffusers(theirs, "test")
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(back[name](), tensor(), strict=True)

    holds()
