"""Tensors that are not read yet: the safetensors library reads what is written, and writes what is read.

Little is read, little is held, and a damaged file is told in one line.
"""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from offsetjax.errors import UserError
from offsetjax.formats import safetensors as module
from offsetjax.formats.safetensors import NotFiniteError, open_file, open_tensors, write_tensors
from offsetjax.formats.shards import open_sharded, write_sharded
from offsetjax.formats.tensors import Tensor, cast, concatenated, of_array, rows, transposed, with_ndim

RNG = np.random.default_rng(0)
ARRAYS = {
    "conv.weight": RNG.normal(size=(70, 5, 3, 3)).astype(np.float32),
    "half": RNG.normal(size=(130, 67)).astype(np.float16),
    "brain": RNG.normal(size=(9, 4)).astype(ml_dtypes.bfloat16),
    "double": RNG.normal(size=(3,)),
    "scalar": np.array(4.6, np.float32),
    "nothing": np.zeros((0, 3), np.float32),
    "position_ids": np.arange(77)[None],
    "flags": np.array([True, False]),
    "bytes": np.arange(5, dtype=np.uint8),
    "größe": np.ones(1, np.int32),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A file of the safetensors library's."""
    path = tmp_path_factory.mktemp("tensors") / "model.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, {"format": "pt", "ss_seed": "0"})
    return path


def test_the_librarys_file_is_read(file: pathlib.Path) -> None:
    tensors, metadata = open_file(file, "here")
    assert metadata == {"format": "pt", "ss_seed": "0"}
    assert tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (tensors[name].shape, tensors[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(tensors[name](), array, strict=True)


def test_the_file_is_the_librarys_byte_for_byte(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tensors = {name: of_array(array) for name, array in ARRAYS.items()}
    write_tensors(tmp_path / "ours.safetensors", tensors, metadata={"format": "pt", "ss_seed": "0"})
    written = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(written[name], array, strict=True)
    metadata = safetensors.safe_open(tmp_path / "ours.safetensors", "np").metadata()
    assert len(metadata.pop("offsetjax.crc32")) == 8 * len(ARRAYS) and metadata == {"format": "pt", "ss_seed": "0"}
    header = safetensors.numpy.save({"a": ARRAYS["half"], "b": ARRAYS["conv.weight"]}, {"format": "pt"})
    two = {"a": of_array(ARRAYS["half"]), "b": of_array(ARRAYS["conv.weight"])}
    write_tensors(tmp_path / "two", two, metadata={"format": "pt"}, has_checksums=False)
    assert (tmp_path / "two").read_bytes() == header


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_are_converted_and_integers_are_not(dtype: str, file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_tensors(tmp_path / "m.safetensors", open_tensors([file], "here"), dtype=dtype)
    for name, tensor in safetensors.numpy.load_file(tmp_path / "m.safetensors").items():
        is_number = ARRAYS[name].dtype not in (np.int64, np.int32, np.uint8, np.bool_)
        np.testing.assert_array_equal(tensor, ARRAYS[name].astype(dtype) if is_number else ARRAYS[name], strict=True)


@pytest.mark.parametrize(
    ("value", "accepting"),
    [
        (65504.0, {"float32", "float16", "bfloat16"}),
        (-65520.0, {"float32", "bfloat16"}),  # halfway to what would be float16's next number, and rounded to that
        (3.4e38, {"float32"}),
        (np.inf, set()),
        (-np.inf, set()),
        (np.nan, set()),
    ],
)
@pytest.mark.parametrize("shape", [(5,), (3, 70), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_only_finite_values_are_written(
    dtype: str, shape: tuple[int, ...], value: float, accepting: set[str], tmp_path: pathlib.Path
) -> None:
    array = np.ones(shape, np.float32)
    array.reshape(-1)[-1] = value
    given = {"plain": of_array(array), "transposed": transposed(of_array(array.T), range(array.ndim)[::-1])}
    given |= {"cast": cast(given["plain"], dtype)}
    for name, tensor in given.items():
        tensors = {name: tensor, "number": of_array(np.int64(-1)), "nothing": of_array(np.zeros(0, np.float32))}
        if dtype in accepting:
            write_tensors(tmp_path / "m.safetensors", tensors, dtype=dtype)
            continue
        with pytest.raises(NotFiniteError, match=f"^{name} has values that are not finite in {dtype}$"):
            write_tensors(tmp_path / "m.safetensors", tensors, dtype=dtype)


COMPOSITIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[np.ndarray], np.ndarray]]] = {
    "itself": (lambda t: t, lambda a: a),
    "transposed": (lambda t: transposed(t, (2, 3, 1, 0)), lambda a: a.transpose(2, 3, 1, 0)),
    "rows": (lambda t: rows(t, 10, 33), lambda a: a[10:33]),
    "rows of columns": (
        lambda t: rows(transposed(t, (1, 0, 2, 3)), 2, 5),
        lambda a: a.transpose(1, 0, 2, 3)[2:5],
    ),
    "concatenated": (lambda t: concatenated([t, rows(t, 3, 20), t]), lambda a: np.concatenate([a, a[3:20], a])),
    "more axes": (lambda t: with_ndim(t, 6), lambda a: a[..., None, None]),
    "fewer axes": (lambda t: with_ndim(with_ndim(t, 6), 4), lambda a: a),
    "cast": (lambda t: cast(t, np.float16), lambda a: a.astype(np.float16)),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_any_part_of_a_composition_is_numpys(name: str, file: pathlib.Path) -> None:
    compose, of_numpy = COMPOSITIONS[name]
    tensor = compose(open_file(file, "here")[0]["conv.weight"])
    array = of_numpy(ARRAYS["conv.weight"])
    assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(tensor(), array)
    rng = np.random.default_rng(1)
    for _ in range(30):
        bounds = [sorted(rng.integers(0, length + 1, 2)) for length in array.shape]
        index = tuple(slice(*map(int, pair)) if rng.random() < 0.7 else slice(None) for pair in bounds)
        np.testing.assert_array_equal(tensor.read(index), array[index])
    np.testing.assert_array_equal(tensor.read((slice(0, 2),)), array[:2])


def test_a_step_is_no_range(file: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="only ranges"):
        open_file(file, "here")[0]["half"].read((slice(0, 4, 2),))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads of files."""
    sizes: list[int] = []
    original = module._File.read

    def read(self: Any, start: int, stop: int) -> np.ndarray:
        sizes.append(stop - start)
        return original(self, start, stop)

    monkeypatch.setattr(module._File, "read", read)
    return sizes


def test_no_more_is_read_than_is_asked_for(file: pathlib.Path, reads: list[int]) -> None:
    tensors = open_tensors([file], "here")
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert reads == [8, header]
    reads.clear()
    half = tensors["half"]
    row = 67 * 2
    for tensor, index, expected in (
        (half, (slice(5, 9),), [4 * row]),
        (transposed(half, (1, 0)), (slice(None), slice(100, 103)), [3 * row]),
        (concatenated([half, half]), (slice(128, 131),), [2 * row, row]),
        (rows(half, 50, 60), (slice(0, 1), slice(3, 4)), [row]),
        (cast(half, np.float32), (slice(0, 2),), [2 * row]),
        (half, (slice(7, 7),), []),
    ):
        tensor.read(index)
        assert reads == expected
        reads.clear()


def test_threads_read_at_once(file: pathlib.Path) -> None:
    tensors = open_tensors([file], "here")
    names = list(ARRAYS) * 50
    with ThreadPoolExecutor(8) as threads:
        for name, array in zip(names, threads.map(lambda name: tensors[name](), names), strict=True):
            np.testing.assert_array_equal(array, ARRAYS[name])


MEASURE = """
import numpy as np, pathlib, sys, threading, time
from offsetjax.formats.safetensors import write_tensors
from offsetjax.formats.tensors import Tensor, transposed

def anonymous():
    fields = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024

shape = (2048, 2048)
tensors = {
    str(i): transposed(Tensor(shape, np.dtype(np.float32), lambda _: np.full(shape, 1, np.float32)), (1, 0))
    for i in range(40)
}
highest, is_over, before = 0.0, False, anonymous()

def watch():
    global highest
    while not is_over:
        highest = max(highest, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
write_tensors(sys.argv[1], tensors, dtype="float16")
is_over = True
thread.join()
print(highest - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory in use")
def test_the_writer_holds_few_tensors_at_a_time(tmp_path: pathlib.Path) -> None:
    """Forty tensors of 16 MB, 640 MB together, as they come from a checkpoint: transposed and in another type."""
    file = tmp_path / "m.safetensors"
    command = [sys.executable, "-c", MEASURE, str(file)]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert file.stat().st_size > 40 * 2 * 2048**2
    assert grown < 150


def parts_of(file: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def assemble(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED = {
    "empty": b"",
    "no length": b"\x00" * 5,
    "a header longer than the file": (10**6).to_bytes(8, "little") + b"{}",
    "an enormous header": (2**63).to_bytes(8, "little") + b"{}",
    "not JSON": assemble(b"{'a': 1}", b""),
    "not text": assemble(b"\xff\xfe\xfd", b""),
    "a list": assemble([], b""),
    "nested without end": assemble(b'{"a":' * 100_000, b""),
    "a number": assemble({"a": 3}, b""),
    "unknown dtype": assemble({"a": entry("F4")}, bytes(8)),
    "no dtype": assemble({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "another field": assemble({"a": entry() | {"stride": 1}}, bytes(8)),
    "a shape of other size": assemble({"a": entry(shape=[3])}, bytes(8)),
    "a negative shape": assemble({"a": entry(shape=[-2, -1])}, bytes(8)),
    "a shape of text": assemble({"a": entry(shape=["2"])}, bytes(8)),
    "an enormous shape": assemble({"a": entry(shape=[2**62, 2**62])}, bytes(8)),
    "three offsets": assemble({"a": entry() | {"data_offsets": [0, 4, 8]}}, bytes(8)),
    "a negative offset": assemble({"a": entry(begin=-8, end=0)}, bytes(8)),
    "overlapping": assemble({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)),
    "a gap": assemble({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)),
    "too short": assemble({"a": entry()}, bytes(7)),
    "too long": assemble({"a": entry()}, bytes(9)),
    "twice": assemble(b'{"a":%s,"a":%s}' % ((json.dumps(entry(shape=[0], end=0)).encode(),) * 2), b""),
    "metadata of numbers": assemble({"__metadata__": {"a": 1}}, b""),
    "metadata as a list": assemble({"__metadata__": ["a"]}, b""),
    "a name above": assemble({"../a": entry()}, bytes(8)),
    "an absolute name": assemble({"/etc/passwd": entry()}, bytes(8)),
    "a name with a line": assemble({"a\nb": entry()}, bytes(8)),
    "no name": assemble({"": entry()}, bytes(8)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_told_in_one_line(name: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(DAMAGED[name])
    with pytest.raises(UserError) as caught:
        open_tensors([file], "model.pretrained")
    message = str(caught.value)
    assert message.startswith(f"model.pretrained: {file} is damaged (") and message.endswith("); fetch it again")
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize("keep", [0, 5, 100, 1000, -1])
def test_a_truncated_file_is_damaged(keep: int, file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"m\.safetensors is damaged \(.*\); fetch it again"):
        open_tensors([tmp_path / "m.safetensors"], "here")


def test_a_file_that_is_truncated_later_is_damaged(tmp_path: pathlib.Path) -> None:
    write_tensors(tmp_path / "m.safetensors", {"a": of_array(np.zeros(10_000, np.float32))})
    tensors = open_tensors([tmp_path / "m.safetensors"], "here")
    with (tmp_path / "m.safetensors").open("r+b") as stream:
        stream.truncate(30_000)
    with pytest.raises(UserError, match="it ends early"):
        tensors["a"]()


def test_files_that_are_missing_or_hold_the_same_tensor_are_refused(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"here: .*other\.safetensors is missing"):
        open_tensors([tmp_path / "other.safetensors"], "here")
    with pytest.raises(UserError, match="is a directory"):
        open_tensors([tmp_path], "here")
    with pytest.raises(UserError, match="in another file too"):
        open_tensors([file, file], "here")


def test_shards_come_back_and_are_listed(tmp_path: pathlib.Path) -> None:
    tensors = {f"layer.{i}": of_array(np.full((10, i + 1), i, np.float32)) for i in range(12)}
    write_sharded(tmp_path, "model", tensors, dtype="float16", max_shard_bytes=500)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(tensor.size for tensor in tensors.values())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for name in files:
        held = safetensors.numpy.load_file(tmp_path / name)
        assert sum(tensor.nbytes for tensor in held.values()) <= 500
        assert held.keys() == {tensor for tensor, file in index["weight_map"].items() if file == name}
    back = open_sharded(tmp_path / "model.safetensors.index.json", "here")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name](), tensor().astype(np.float16), strict=True)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no index of safetensors files"),
        ("[]", "is no index of safetensors files"),
        ('{"weight_map": 3}', "is no index of safetensors files"),
        ('{"weight_map": {}}', "names no files"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "which is no file beside it"),
        ('{"weight_map": {"a": "/tmp/a.safetensors"}}', "which is no file beside it"),
        ('{"weight_map": {"a": "sub/a.safetensors"}}', "which is no file beside it"),
        ('{"weight_map": {"a": "..safetensors"}}', "which is no file beside it"),
        ('{"weight_map": {"a": "a.bin"}}', "which is no file beside it"),
        ('{"weight_map": {"a": 3}}', "which is no file beside it"),
        ('{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}', r"b\.safetensors is missing, which"),
        ('{"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}', r"a\.safetensors is damaged \(b is missing\)"),
    ],
)
def test_an_index_that_leads_astray_is_refused(index: str, message: str, tmp_path: pathlib.Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message) as caught:
        open_sharded(tmp_path / "model.safetensors.index.json", "here")
    assert "\n" not in str(caught.value)


def test_a_header_of_a_million_tensors_costs_no_more_than_its_reading(tmp_path: pathlib.Path) -> None:
    header = ",".join(f'"t{each}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for each in range(300_000))
    text = f"{{{header}}}".encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    begin = time.monotonic()
    with pytest.raises(UserError, match="is damaged \\(300000 tensors, more than 65536\\)"):
        open_file(tmp_path / "a.safetensors", "here")
    assert time.monotonic() - begin < 1
