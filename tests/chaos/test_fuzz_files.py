"""Files of any content: what is read is sound, or one line says what is wrong; no stack trace, nothing takes long."""

import json
import math
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from offsetjax.config import flatten, to_json
from offsetjax.config.schema import fields
from offsetjax.data import captions, metadata
from offsetjax.data.folder import list_folder
from offsetjax.data.items import Dropped
from offsetjax.diffusion.calibration import Calibration, read_calibration, write_calibration
from offsetjax.errors import UserError
from offsetjax.formats.header import Entry, format_header, parse_header
from offsetjax.formats.safetensors import open_file
from offsetjax.formats.shards import open_sharded
from offsetjax.formats.tokenizer import read_vocabulary, write_vocabulary
from offsetjax.models import trained
from offsetjax.models.json_tokenizer import read_tokenizer
from offsetjax.models.pipeline import build
from offsetjax.models.resolve import resolve
from offsetjax.models.tokenizer import train_tokenizer
from offsetjax.plan import costs
from offsetjax.report.read import _read_samples
from offsetjax.training.jsonl import read_log
from tests import tiny
from tests.chaos.mutations import changed

SECONDS = 1.0  # a kilobyte takes no longer


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        good: one that is read.
        read: reads a file of this content in a folder, and asserts that what it gives is sound.
        refusals: with which it may be refused, in one line.
    """

    good: bytes
    read: Callable[[bytes, pathlib.Path], None]
    is_json: bool = True
    refusals: tuple[type[Exception], ...] = (UserError,)


def _written(content: bytes, file: pathlib.Path) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def _header(content: bytes, folder: pathlib.Path) -> None:
    entries, metadata = parse_header(content)
    assert all(isinstance(value, str) for value in metadata.values())
    end = 0
    for entry in entries:
        assert entry.begin == end and entry.end - end == math.prod(entry.shape) * entry.dtype.itemsize
        end = entry.end


def _safetensors(content: bytes, folder: pathlib.Path) -> None:
    for tensor in open_file(_written(content, folder / "a.safetensors"), "here")[0].values():
        assert tensor().shape == tensor.shape


def _index(content: bytes, folder: pathlib.Path) -> None:
    _written(SAFETENSORS, folder / "a.safetensors")
    assert open_sharded(_written(content, folder / "a.safetensors.index.json"), "here")


def _metadata(content: bytes, folder: pathlib.Path) -> None:
    for suffix in ("jsonl", "csv", "tsv", "json", "parquet"):
        name = f"metadata.{suffix}"
        for row in metadata.read_metadata(_written(content, folder / name), name):
            if isinstance(row, metadata.Row):
                assert isinstance(row.file_name, str)
                "".join(row.captions).encode()  # they can be written


def _caption(content: bytes, folder: pathlib.Path) -> None:
    refused = None
    for suffix in captions.SIDE_SUFFIXES:
        try:
            for caption in captions.read_side_file(_written(content, folder / f"a{suffix}"), "whole"):
                assert caption.strip() == caption
                caption.encode()
        except Dropped as error:
            refused = error
    if refused:
        raise refused


def _name(content: bytes, folder: pathlib.Path) -> None:
    """A picture of that name, as far as a system allows it, and a line about it."""
    root = folder / "pictures"
    root.mkdir(exist_ok=True)
    for file in root.iterdir():
        file.unlink()
    name = content.replace(b"\0", b"").replace(b"/", b"")[:200]
    if name not in (b"", b".", b".."):
        pathlib.Path(bytes(root).decode() + "/" + name.decode(errors="surrogateescape") + ".png").write_bytes(b"x")
    row = {"file_name": content.decode(errors="replace"), "text": content.decode(errors="surrogateescape")}
    (root / "metadata.jsonl").write_text(json.dumps(row))
    list_folder(root)


def _metrics(content: bytes, folder: pathlib.Path) -> None:
    for line in read_log(_written(content, folder / "metrics.jsonl").parent).lines:
        assert line.step >= 0 and all(isinstance(value, float) for value in line.values.values())


def _calibration(content: bytes, folder: pathlib.Path) -> None:
    calibration = read_calibration(_written(content, folder / "c.json"))
    assert np.isfinite(calibration.power).all() and calibration.num_examples >= 1


def _samples(content: bytes, folder: pathlib.Path) -> None:
    samples = _read_samples(_written(content, folder / "s.json"))
    assert samples.records and all(0 <= record.brightness <= 1 for record in samples.records)
    assert math.isfinite(samples.guidance_scale) and samples.num_steps >= 1 and samples.step >= 0


def _run_config(content: bytes, folder: pathlib.Path) -> None:
    _written(content, folder / "config.json")
    for path, value in flatten(trained.read_config(folder)):
        assert fields()[path].has_type(value)


def _part(name: str) -> Callable[[bytes, pathlib.Path], None]:
    def read(content: bytes, folder: pathlib.Path) -> None:
        for file, good in DIRECTORY.items():
            _written(content if file == name else good, folder / file)
        config = resolve(tiny.tiny_config(model__pretrained=str(folder)))
        for path, value in flatten(config):
            assert fields()[path].has_type(value) and fields()[path].holds(value), path
        build(config, {"text_encoder": TOKENIZER})

    return read


def _tokenizer(name: str, is_one_file: bool = False) -> Callable[[bytes, pathlib.Path], None]:
    def read(content: bytes, folder: pathlib.Path) -> None:
        write_vocabulary(folder, TOKENIZER.vocabulary)
        _written(content, folder / name)
        for other in ("vocab.json", "merges.txt", "special_tokens_map.json") if is_one_file else ():
            (folder / other).unlink(missing_ok=True)
        vocabulary = read_vocabulary(folder)
        assert all(isinstance(token, str) and number >= 0 for token, number in vocabulary.ids.items())
        assert vocabulary.max_length >= 2

    return read


def _json_tokenizer(content: bytes, folder: pathlib.Path) -> None:
    write_vocabulary(folder, TOKENIZER.vocabulary)
    _written(content, folder / "tokenizer_config.json")
    tokenizer = read_tokenizer(folder, 16)
    assert len(tokenizer.padded("a cat")[0]) == 16


def _hlo(content: bytes, folder: pathlib.Path) -> None:
    work, exchanged = costs.read_program(content.decode(errors="replace"))
    assert all(each.flops >= 0 and each.times >= 1 for each in work)
    assert all(each.num_bytes >= 0 for each in exchanged)


def _tokenizer_files(folder: pathlib.Path) -> dict[str, bytes]:
    write_vocabulary(folder, TOKENIZER.vocabulary)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _good_calibration(folder: pathlib.Path) -> bytes:
    schedule = {**tiny.tiny_config().schedule.to_dict()}
    calibration = Calibration(
        num_examples=4,
        resolution=16,
        height=8,
        width=8,
        mean=np.zeros(2),
        mean_variance=np.ones(2),
        frequency=np.array([0.0, 1.0, 2.0]),
        power=np.ones((2, 3)),
        schedule=schedule,
        target_terminal_snr=1e-3,
    )
    write_calibration(folder / "c.json", calibration, None)
    return (folder / "c.json").read_bytes()


TOKENIZER = train_tokenizer(("a cat", "a dog on a hill"), 560, 8)
_ENTRIES = [Entry("a", np.dtype(np.float32), (2, 3), 0, 24), Entry("b.c", np.dtype(np.int8), (4,), 24, 28)]
SAFETENSORS = format_header(_ENTRIES, {"format": "pt"}) + bytes(range(28))
_CONFIG = tiny.tiny_config()
DIRECTORY = {
    "model_index.json": json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"]}).encode(),
    "unet/config.json": json.dumps(_CONFIG.model.unet.to_dict() | {"addition_embed_type": None}).encode(),
    "vae/config.json": json.dumps(_CONFIG.model.vae.to_dict()).encode(),
    "text_encoder/config.json": json.dumps(_CONFIG.model.text_encoder.to_dict()).encode(),
    "scheduler/scheduler_config.json": json.dumps(
        {
            "_class_name": "DDIMScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "set_alpha_to_one": False,
            "steps_offset": 1,
        }
    ).encode(),
}
HLO = b"""HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[16,128])) -> (s32[], f32[16,128]) {
  %p = (s32[], f32[16,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[16,128]{1,0} get-tuple-element(%p), index=1
  %w = f32[128,128]{1,0} constant({...})
  %d = f32[16,128]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %r = f32[16,128]{1,0} all-reduce(%d), replica_groups=[1,8]<=[8], to_apply=%sum
  ROOT %t = (s32[], f32[16,128]{1,0}) tuple(%i, %r)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%until (q: (s32[], f32[16,128])) -> pred[] {
  %q = (s32[], f32[16,128]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(10)
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (s: (s32[], f32[16,128])) -> (s32[], f32[16,128]) {
  %s = (s32[], f32[16,128]{1,0}) parameter(0)
  ROOT %while = (s32[], f32[16,128]{1,0}) while(%s), condition=%until, body=%body
}
"""
SAMPLES = {
    "step": 6,
    "params": "ema",
    "start_noise": "matched",
    "guidance_scale": 1.0,
    "num_steps": 2,
    "records": [{"prompt": "a cat", "seed": 0, "brightness": 0.5, "box": [0, 0, 16, 16]}],
}


def kinds(folder: pathlib.Path) -> dict[str, Kind]:
    """All kinds; the folder takes what good files are made with."""
    tokenizer = _tokenizer_files(folder / "tokenizer")
    line = b'{"step": 1, "loss": 0.5, "skipped": 0, "time_seconds": 1.5}\n'
    return {
        "header": Kind(SAFETENSORS[8:-28], _header, refusals=(ValueError,)),
        "safetensors": Kind(SAFETENSORS, _safetensors, is_json=False),
        "index": Kind(b'{"weight_map": {"a": "a.safetensors"}}', _index),
        "metadata.jsonl": Kind(b'{"file_name": "a.png", "text": "a cat"}', _metadata),
        "metadata.jsonl, lines": Kind(b'{"file_name": "a.png", "text": "a cat"}\n' * 3, _metadata, is_json=False),
        "caption": Kind(b'{"text": "a cat", "caption": ["a", "b"]}', _caption, refusals=(Dropped,)),
        "file name": Kind("größe a.png".encode(), _name, is_json=False),
        "metrics.jsonl": Kind(line.strip(), _metrics),
        "metrics.jsonl, lines": Kind(line * 3, _metrics, is_json=False),
        "calibration": Kind(_good_calibration(folder), _calibration),
        "samples": Kind(json.dumps(SAMPLES).encode(), _samples),
        "run's config": Kind(to_json(_CONFIG).encode(), _run_config),
        **{name: Kind(good, _part(name)) for name, good in DIRECTORY.items()},
        **{name: Kind(tokenizer[name], _tokenizer(name), name != "merges.txt") for name in tokenizer},
        "tokenizer.json alone": Kind(tokenizer["tokenizer.json"], _tokenizer("tokenizer.json", is_one_file=True)),
        "tokenizer_config.json of a JSON tokenizer": Kind(tokenizer["tokenizer_config.json"], _json_tokenizer),
        "HLO": Kind(HLO, _hlo, is_json=False, refusals=(ValueError,)),
    }


NAMES = [
    *("header", "safetensors", "index", "metadata.jsonl", "metadata.jsonl, lines", "caption", "file name"),
    *("metrics.jsonl", "metrics.jsonl, lines", "calibration", "samples", "run's config", *DIRECTORY),
    *("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"),
    *("tokenizer.json alone", "tokenizer_config.json of a JSON tokenizer", "HLO"),
]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    found = kinds(tmp_path_factory.mktemp("good"))
    assert list(found) and set(found) == set(NAMES)
    return found


def _refusal(kind: Kind, content: bytes, folder: pathlib.Path) -> str:
    """Why it is not read, in a line; "" where it is."""
    try:
        kind.read(content, folder)
    except kind.refusals as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 3000, message[:500]
        message.encode()
        return message
    return ""


ONCE_FAILED = [("model_index.json", {"_class_name": [["a"] * 300] * 4, "unet": ["diffusers", "UNet"]})]  # 5,000 letters


@pytest.mark.parametrize(("name", "content"), ONCE_FAILED)
def test_what_once_failed_is_refused_in_a_line(
    name: str, content: Any, every: dict[str, Kind], tmp_path: pathlib.Path
) -> None:
    assert _refusal(every[name], json.dumps(content).encode(), tmp_path)


def _fuzz(kind: Kind, folder: pathlib.Path, count: int) -> int:
    seconds = []
    _refusal(kind, kind.good, folder)  # what is imported or computed once is not the input's cost

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < 100,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(changed(kind.good, kind.is_json))
    def check(content: bytes) -> None:
        begin = time.process_time()
        _refusal(kind, content, folder)
        seconds.append(time.process_time() - begin)
        assert seconds[-1] < SECONDS * max(1, len(content) / 1000)

    check()
    return len(seconds)


@pytest.mark.parametrize("name", NAMES)
def test_the_good_file_is_read(name: str, every: dict[str, Kind], tmp_path: pathlib.Path) -> None:
    assert _refusal(every[name], every[name].good, tmp_path) == ""


@pytest.mark.parametrize("name", NAMES)
def test_any_content_is_sound_or_refused_in_a_line(name: str, every: dict[str, Kind], tmp_path: pathlib.Path) -> None:
    _fuzz(every[name], tmp_path, 30)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_any_content_is_sound_or_refused_in_a_line_1000(
    name: str, every: dict[str, Kind], tmp_path: pathlib.Path
) -> None:
    print(f"\n{name}: {_fuzz(every[name], tmp_path, 1000)} inputs")
