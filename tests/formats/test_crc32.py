"""Every tensor in a file of ours has a checksum: a changed bit is told by whoever reads the tensor, and by `verify`.

Files of other programs are read as they are, also those that took our metadata over.
"""

import os
import pathlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from offsetjax.cli import main
from offsetjax.errors import TransientError, UserError
from offsetjax.formats import crc32
from offsetjax.formats import safetensors as module
from offsetjax.formats.header import format_header, parse_header
from offsetjax.formats.safetensors import open_file, verify_file, write_tensors
from offsetjax.formats.shards import write_sharded
from offsetjax.formats.tensors import Tensor, of_array

RNG = np.random.default_rng(0)
ARRAYS = {
    "conv.weight": RNG.normal(size=(7, 5, 3, 3)).astype(np.float32),
    "half": RNG.normal(size=(13, 6)).astype(np.float16),
    "brain": RNG.normal(size=(9, 4)).astype(ml_dtypes.bfloat16),
    "scalar": np.array(4.6, np.float32),
    "nothing": np.zeros((0, 3), np.float32),
    "nothing either": np.zeros((0,), np.float32),
    "position_ids": np.arange(77)[None],
    "flags": np.array([True, False]),
    "größe": np.ones(1, np.int32),
}
TENSORS = {name: of_array(array) for name, array in ARRAYS.items()}
METADATA = {"format": "pt", "ss_seed": "0"}


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    write_tensors(tmp_path / "m.safetensors", TENSORS, metadata=METADATA)
    return tmp_path / "m.safetensors"


def flip(file: pathlib.Path, name: str, bit: int = -1) -> None:
    """Turns one bit of a tensor; by default the lowest of its last byte."""
    start, entries = parts_of(file)
    [entry] = [entry for entry in entries if entry.name == name]
    data = bytearray(file.read_bytes())
    bit = bit if bit >= 0 else 8 * (entry.end - entry.begin - 1)
    data[start + entry.begin + bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def parts_of(file: pathlib.Path) -> tuple[int, list[Any]]:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return start, parse_header(data[8:start])[0]


def told(line: str, where: str, file: pathlib.Path, name: str) -> bool:
    return "\n" not in line and line == (
        f"{where}: {file} is damaged: {name} differs from the checksum in its header; export it again or restore it "
        "from a copy"
    )


def test_any_flipped_bit_of_any_tensor_is_told(file: pathlib.Path) -> None:
    whole = file.read_bytes()
    assert verify_file(file, "here") == len(ARRAYS)
    rng = np.random.default_rng(1)
    for name, array in ARRAYS.items():
        for bit in [0, *rng.integers(0, 8 * array.nbytes, 5)] if array.nbytes else []:
            flip(file, name, int(bit))
            tensors, metadata = open_file(file, "model.pretrained")
            with pytest.raises(UserError) as caught:
                tensors[name]()
            assert told(str(caught.value), "model.pretrained", file, name)
            for other in ARRAYS.keys() - {name}:
                np.testing.assert_array_equal(tensors[other](), ARRAYS[other], strict=True)
            assert metadata == METADATA
            with pytest.raises(UserError) as caught:
                verify_file(file, "checkpoint")
            assert told(str(caught.value), "checkpoint", file, name)
            file.write_bytes(whole)


def test_many_damaged_tensors_are_one_line(file: pathlib.Path) -> None:
    for name in (name for name, array in ARRAYS.items() if array.nbytes):
        flip(file, name)
    with pytest.raises(
        UserError, match=r"is damaged: position_ids, conv\.weight, größe, scalar and 3 more differ from"
    ):
        verify_file(file, "here")


@pytest.mark.parametrize(("old", "new"), [(b'"half"', b'"hals"'), (b"[9,4]", b"[4,9]"), (b'"F16"', b'"I16"')])
def test_what_the_header_says_of_a_tensor_is_compared_too(old: bytes, new: bytes, file: pathlib.Path) -> None:
    data = file.read_bytes()
    assert data.count(old) == 1
    file.write_bytes(data.replace(old, new))
    with pytest.raises(UserError, match=r"is damaged: \S+ differs"):
        verify_file(file, "here")


@pytest.mark.parametrize("index", [(slice(2, 5), slice(1, 3)), (slice(12, 13),), (slice(None), slice(1, 3))])
def test_a_part_of_a_tensor_is_compared_as_the_whole(
    file: pathlib.Path, index: tuple[slice, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE_BYTES", 50)
    half = open_file(file, "here")[0]["half"]
    for _ in range(2):
        np.testing.assert_array_equal(half.read(index), ARRAYS["half"][index])
    flip(file, "half")
    with pytest.raises(UserError, match="half differs"):
        open_file(file, "here")[0]["half"].read(index)


def test_the_whole_is_read_once_for_all_of_its_parts(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, half = [], open_file(file, "here")[0]["half"]
    monkeypatch.setattr(module._File, "read", _counted(module._File.read, read))
    for row in range(13):
        half.read((slice(row, row + 1),))
    assert sum(read) == 2 * ARRAYS["half"].nbytes


def _counted(function: Any, read: list[int]) -> Any:
    def count(file: Any, start: int, stop: int) -> Any:
        read.append(stop - start)
        return function(file, start, stop)

    return count


def test_a_long_tensor_is_compared_in_pieces(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_BYTES", 100)
    assert verify_file(file, "here") == len(ARRAYS)
    flip(file, "conv.weight", 8 * 150)
    with pytest.raises(UserError, match=r"damaged: conv\.weight differs"):
        verify_file(file, "here")


def test_a_file_of_another_program_is_read_and_not_compared(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(ARRAYS, file, METADATA)
    assert verify_file(file, "here") is None
    flip(file, "half")
    assert open_file(file, "here")[0]["half"]().shape == (13, 6)


def test_a_program_that_takes_our_metadata_over_is_not_accused(file: pathlib.Path) -> None:
    """As one that merges models does: the same names and shapes, other values, our checksums."""
    metadata = safetensors.safe_open(file, "np").metadata()
    merged = {**ARRAYS, "half": ARRAYS["half"] * np.float16(2)}
    for _ in range(3):  # the library writes metadata in any order
        safetensors.numpy.save_file(merged, file, metadata)
        tensors, read = open_file(file, "here")
        np.testing.assert_array_equal(tensors["half"](), merged["half"])
        assert read == METADATA and verify_file(file, "here") is None


def test_without_checksums_nothing_is_read_twice_or_compared(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A work directory's frozen weights, which have checksums in a file of their own."""
    monkeypatch.setattr(module, "is_remote", lambda path: True)
    values = iter((1,))
    tensor = Tensor((1,), np.dtype(np.int32), lambda index: np.full(1, next(values), np.int32))
    file = tmp_path / "m.safetensors"
    write_tensors(file, {"a": tensor}, metadata=METADATA, has_checksums=False)
    assert safetensors.safe_open(file, "np").metadata() == METADATA and verify_file(file, "here") is None


@pytest.mark.parametrize("change", [lambda t: t[:-8], lambda t: t[:-1], lambda t: "", lambda t: "+" + t[1:]])
def test_checksums_that_are_not_whole_are_one_line(change: Any, file: pathlib.Path) -> None:
    data = file.read_bytes()
    start, entries = parts_of(file)
    sums = safetensors.safe_open(file, "np").metadata()[crc32.KEY]
    header = format_header(entries, METADATA | {crc32.KEY: change(sums)}, crc32.ENDING)
    file.write_bytes(header + data[start:])
    for read in (open_file, verify_file):
        with pytest.raises(
            UserError, match=r"m\.safetensors is damaged \(offsetjax\.crc32 has not 8 .*9 tensors\); fet"
        ):
            read(file, "here")


def test_to_a_bucket_the_same_is_written_without_going_back(
    file: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe stands for the bucket: neither can be gone back into."""
    monkeypatch.setattr(module, "is_remote", lambda path: True)
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as reader:
        received = reader.submit((tmp_path / "pipe").read_bytes)
        write_tensors(tmp_path / "pipe", TENSORS, metadata=METADATA)
    assert received.result() == file.read_bytes()


def test_what_changes_between_two_readings_is_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_remote", lambda path: True)
    values = iter((1, 2))
    tensor = Tensor((1,), np.dtype(np.int32), lambda index: np.full(1, next(values), np.int32))
    with pytest.raises(TransientError, match="not the same when they were read again"):
        write_tensors(tmp_path / "m.safetensors", {"a": tensor})


def verify(path: pathlib.Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, list[str], str]:
    """The status, the lines of the report, and the error."""
    status = main(["checkpoint", "verify", str(path), *more])
    captured = capsys.readouterr()
    assert captured.err.count("\n") == (1 if status else 0), captured.err
    return status, captured.out.splitlines(), captured.err


def test_the_command_verifies_a_file_or_a_directory(
    file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(file, capsys)[:2] == (0, ["m.safetensors  good: 9 tensors"])
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "vae").mkdir()
    write_sharded(model / "unet", "weights", TENSORS, max_shard_bytes=1300)
    shards = sorted((model / "unet").glob("*.safetensors"))
    assert len(shards) == 2
    shutil.copy(file, model / "vae" / "weights.safetensors")
    (model / "vae" / ".x.safetensors").write_bytes(b"half")
    status, lines, _ = verify(model, capsys)
    assert status == 0 and len(lines) == 3 and all("  good: " in line for line in lines)

    name = parts_of(shards[1])[1][-1].name
    flip(shards[1], name)
    status, lines, err = verify(model, capsys)
    assert status == 2 and f"damaged files of {model}: 1; export it again or restore it from a copy" in err
    assert [line.split("  ")[0] for line in lines if "good" in line] == [
        f"unet/{shards[0].name}",
        "vae/weights.safetensors",
    ]
    assert lines[1].startswith(f"unet/{shards[1].name}  {shards[1]} is damaged: {name} differs")
    shards[1].unlink()
    assert f"{shards[1].name} is missing" in verify(model, capsys)[2]


def test_the_command_says_what_it_cannot_verify(
    file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.numpy.save_file(ARRAYS, tmp_path / "theirs.safetensors")
    status, lines, err = verify(tmp_path, capsys)
    assert lines == ["m.safetensors  good: 9 tensors", "theirs.safetensors  not compared: it has no checksums"]
    assert status == 2 and "without checksums: 1; another program wrote them" in err
    assert "--step cannot apply" in verify(file, capsys, "--step=3")[2]
    assert "is missing; give an exported file" in verify(tmp_path / "no", capsys)[2]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "has no .safetensors file" in verify(tmp_path / "run", capsys)[2]
    (tmp_path / "run" / "config.json").touch()
    assert f"give it as --workdir={tmp_path}/run" in verify(tmp_path / "run", capsys)[2]
