"""Damaged work directories, and exports and pictures that cannot be: one line, exit status 2, nothing left behind."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.cli import main
from offsetjax.models.trained import load_trained
from offsetjax.storage import checkpoint
from tests import tiny
from tests.damage import (
    TEXT,
    VAE,
    Change,
    contents,
    cut,
    refused,
    removed,
    save_good_models,
    with_tensors,
    written,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    data = tiny.data_path(tmp_path_factory.getbasetemp())
    return save_good_models(tmp_path_factory.mktemp("good"), data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.trained_workdir(tmp_path_factory.getbasetemp())


@pytest.fixture
def run(trained: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a finished training, of whole weights, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--format=lora", "--out={0}/o.safetensors"),
            r"whole weights \(lora.rank = 0\); use --format=diffusers or sing",
        ),
        (("--format=lora", "--out={0}/o"), "--format=lora writes one file; give an --out that ends in .safetensors"),
        (("--format=single_file", "--out={0}/o"), "--format=single_file writes one file; give an --out that ends in"),
        (("--format=single_file", "--out={0}/o.ckpt"), "give an --out that ends in .safetensors, not .*o.ckpt"),
        (
            ("--format=single_file", "--out={0}/o.safetensors"),
            "no autoencoder without attention.*; export a diffusers d",
        ),
        (("--out={0}/run",), "run exists; give another --out, or remove it"),
        (("--out={0}/run/config.json",), "config.json exists; give another --out, or remove it"),
        (("--out={0}/run/config.json/o",), "run/config.json: Not a directory; see to it and try again"),
        (("--out=",), "--out is empty; give a path"),
        (("--out={0}/o", "--workdir="), "--workdir is empty; give a path"),
        (("--out={0}/a/b", "--step=5"), r"has no step 5 \(it has 2, 4, 6\); give --step one of these"),
        (("--out={0}/o", "--step=-1"), r"has no step -1 \(it has 2, 4, 6\)"),
        (("--out={0}/o", "--max_shard_gb=0"), "--max_shard_gb=0.0 must be above 0"),
        (("--out={0}/o", "--max_shard_gb=nan"), "--max_shard_gb=nan must be above 0"),
        (("--out={0}/o", "--max_shard_gb=inf"), "--max_shard_gb=inf must be above 0"),
        (("--out={0}/o", "--lora_keys=kohya"), "--lora_keys cannot apply to --format=diffusers; leave it out"),
        (("--out={0}/o", "--stop=5"), "unknown argument --stop=5; see --help"),
    ],
)
def test_an_export_that_cannot_be_is_refused(
    arguments: tuple[str, ...],
    words: str,
    run: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(tmp_path)
    line = refused(capsys, "export", f"--workdir={run}", *(argument.format(tmp_path) for argument in arguments))
    assert re.search(words, line), line
    assert contents(tmp_path) == before


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="no folder that even root cannot write to")
@pytest.mark.parametrize("action", ["sample", "export"])
def test_a_folder_that_cannot_be_written_is_told(
    action: str,
    trained: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    more = ["--prompt=a", "--num_steps=1"] if action == "sample" else []
    with tiny.quick_compilation(tmp_path_factory.getbasetemp()):
        line = refused(capsys, action, f"--workdir={trained}", "--out=/proc/pictures", *more)
    missing = r"/proc/\S*pictures\S*: No such file or directory; see to it and try again"
    assert re.search(rf"error: ({missing}|sample: /proc cannot be written to; give another --out)", line), line


def averaged_kernel(run: pathlib.Path) -> tuple[pathlib.Path, bytes]:
    """A shard of an averaged kernel, and the file of the newest checkpoint that holds it."""
    kernel = np.asarray(load_trained(run).params["unet"]["mid_block"]["resnets_1"]["conv2"]["kernel"])
    wanted = np.split(kernel, 4, axis=2)[0].tobytes()
    files = [path for path in (run / "checkpoints" / "6").rglob("*") if path.is_file()]
    [file] = [path for path in files if wanted in path.read_bytes()]
    return file, wanted


def damage_array(run: pathlib.Path) -> None:
    """Changes one bit of it."""
    file, wanted = averaged_kernel(run)
    file.write_bytes(file.read_bytes().replace(wanted, bytes([wanted[0] ^ 1]) + wanted[1:]))


def damage_file(run: pathlib.Path) -> None:
    """Turns all bits round in its file."""
    file, _ = averaged_kernel(run)
    file.write_bytes((np.frombuffer(file.read_bytes(), np.uint8) ^ 0xFF).tobytes())


def without_checksums(run: pathlib.Path) -> None:
    file = run / "checkpoints" / "6" / "data" / "metadata"
    data = json.loads(file.read_text())
    del data["checksums"]
    file.write_text(json.dumps(data))


def emptied(folder: str) -> Change:
    def change(run: pathlib.Path) -> None:
        shutil.rmtree(run / folder)
        (run / folder).mkdir()

    return change


FROZEN = f"frozen/{VAE}"
OVERFLOW = with_tensors(f"frozen/{TEXT}", text_model__final_layer_norm__bias=lambda bias: bias + np.float32(1e6))


def flipped(file: str) -> Change:
    """Changes the lowest bit of the last number of a file's last tensor."""

    def change(run: pathlib.Path) -> None:
        data = bytearray((run / file).read_bytes())
        data[-4] ^= 1
        (run / file).write_bytes(data)

    return change


# By name: what is done to a work directory, and words of the error of whatever reads it.
RUNS: dict[str, tuple[Change, str]] = {
    "an array of one bit": (
        damage_array,
        r"checkpoints/6 cannot be read \(ema_params/unet/mid_block/resnets_1/conv2/kernel is damaged: its ch",
    ),
    "a file of arrays": (
        damage_file,
        r"checkpoints/6 cannot be read \(.+\)$",
    ),
    "no state": (removed("checkpoints/6/state"), "checkpoints/6 cannot be read"),
    "no position": (removed("checkpoints/6/data"), "checkpoints/6 cannot be read"),
    "no checkpoint": (removed("checkpoints"), "run has no checkpoint yet"),
    "an empty folder of checkpoints": (emptied("checkpoints"), "checkpoints has no checkpoint yet; wait for the first"),
    "a checkpoint of an older version": (
        without_checksums,
        "run/checkpoints was written by an older version of offsetjax, without checksums; continue with that version",
    ),
    "no config": (removed("config.json"), "run has no config.json; give the --workdir of a training"),
    "half a config": (cut("config.json", 0.5), r"config.json is no config \(.*\); restore it from a copy"),
    **{
        f"the config {text}": (written("config.json", text), rf"config.json is no config \({words}\); restore it")
        for text, words in {
            "[1]": "a list, not an object",
            "null": "a null, not an object",
            "[" * 10**5: ".*",
        }.items()
    },
    "no frozen part": (removed("frozen/vae"), "workdir: .*frozen/vae/.* is missing"),
    "half a frozen part": (cut(FROZEN, 0.5), rf"workdir: .*{FROZEN} is damaged \("),
    "a bit of a frozen part": (
        flipped(FROZEN),
        r"run/frozen: vae/\S+ is damaged: its checksum is .*; restore it from a c",
    ),
    "a frozen tensor too few": (with_tensors(FROZEN, decoder__conv_out__bias=None), "conv_out.bias is missing"),
    "a frozen tensor too many": (with_tensors(FROZEN, more__bias=np.zeros(3, np.float32)), "more.bias is not part of"),
    "no tokenizer": (removed("frozen/tokenizer"), "frozen lacks a tokenizer; restore it from a copy"),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("action", ["sample", "export"])
def test_a_damaged_training_is_refused(
    action: str, name: str, run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = RUNS[name]
    change(run)
    before = contents(tmp_path)
    more = ["--prompt=a"] if action == "sample" else []
    line = refused(capsys, action, f"--workdir={run}", f"--out={tmp_path}/out", *more)
    assert re.search(words, line), line
    assert contents(tmp_path) == before


def test_a_value_that_float16_cannot_hold_ends_the_export(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    OVERFLOW(run)
    removed("frozen/checksums.json", "frozen/digests.json")(run)
    before = contents(tmp_path)
    line = refused(capsys, "export", f"--workdir={run}", f"--out={tmp_path}/new/folder/out", "--dtype=float16")
    assert re.search(
        r"export: text_encoder: \S*final_layer_norm.bias has values that are not finite in float16; ", line
    )
    assert line.endswith("; give other --params or an earlier --step, or --dtype=float32")
    assert contents(tmp_path) == before
    assert main(["export", f"--workdir={run}", f"--out={tmp_path}/out", "--dtype=bfloat16"]) == 0


def test_weights_that_are_no_numbers_end_the_export(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = jax.tree.map(np.array, load_trained(run, which="raw").params)
    params["unet"]["conv_in"]["kernel"][0, 0, 0, 0] = np.nan
    with checkpoint.open_checkpoints(run) as manager:
        checkpoint.save(manager, 8, {"params": jax.tree.map(jnp.asarray, params)}, {"next_batch": 8})
    before = contents(tmp_path)
    arguments = ("export", f"--workdir={run}", f"--out={tmp_path}/new/folder/out", "--params=raw")
    line = refused(capsys, *arguments)
    assert line.endswith(
        "unet: conv_in.weight has values that are not finite in float32; give other --params or an earlier --step"
    )
    sampled = ("sample", f"--workdir={run}", f"--out={tmp_path}/pictures", "--params=raw", "--prompt=a boat")
    line = refused(capsys, *sampled)
    assert "step 8: unet/conv_in/kernel of the raw weights has values that are not finite; give other --params" in line
    assert contents(tmp_path) == before
    assert main([*arguments, "--step=6"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workdir={run}", "--compare={tmp}/none"), "none is neither a diffusers directory nor a .safetensors file"),
        (("--workdir={run}", "--compare={base}/sd1_lora.safetensors"), "is a LoRA, not a model"),
        (("--workdir={run}", "--compare={base}/sd1/unet"), "sd1/unet holds none of unet, vae"),
        (("--workdir={run}", "--compare="), "--compare is empty; give a path"),
        (("--model=",), "--model is empty; give a path"),
        (("--model={base}/sd1", "--step=0"), "--step cannot apply to --model"),
        (("--model={base}/sd1", "--params=raw"), "--params cannot apply to --model"),
        (("--workdir={run}", "--lora={base}/sd1_lora.safetensors"), "--lora cannot apply to --workdir"),
        (("--workdir={run}", "--variant=fp16"), "--variant cannot apply to --workdir"),
        (("--model={run}", "--variant=fp16"), "is a work directory, to which --variant and --lora cannot apply"),
        (("--model={base}/sd1", "--variant=fp16"), "has no weights 'fp16'; it has the plain files"),
        (("--model={base}/sd1.safetensors", "--variant=fp16"), "'fp16' cannot apply to .*, which is one file"),
    ],
)
def test_what_cannot_be_drawn_with_is_told_before_anything_is_drawn(
    arguments: tuple[str, ...],
    words: str,
    base: pathlib.Path,
    trained: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("offsetjax.sampling.sample.make_sampler", None)
    given = [argument.format(run=trained, base=base, tmp=tmp_path) for argument in arguments]
    line = refused(capsys, "sample", *given, "--prompt=a", f"--out={tmp_path}/out")
    assert re.search(words, line), line
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("out", ["file", "file/in it"])
def test_pictures_do_not_go_where_a_file_is(
    out: str,
    trained: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("offsetjax.sampling.sample.make_sampler", None)
    (tmp_path / "file").write_text("mine")
    line = refused(capsys, "sample", f"--workdir={trained}", "--prompt=a", f"--out={tmp_path}/{out}")
    assert "file is a file, where --out needs a folder; give another --out" in line
    assert contents(tmp_path) == {str(tmp_path / "file"): b"mine"}
