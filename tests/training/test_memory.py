"""What a model costs in memory, read into its shards and exported: processes of their own measure themselves."""

import importlib
import pathlib
import shutil
from collections.abc import Iterator

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from offsetjax.exporting.export import export
from offsetjax.formats.names import from_torch, torch_name
from offsetjax.models.trained import open_stored
from tests.large_models import MB, family_config, import_model, run_config, wide_config, write_model
from tests.processes import call, call_together, memory, most_growth
from tests.untrained import begin

pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="/proc tells the memory")
LIBRARIES = 68 * MB  # that are loaded meanwhile, with the store of what is compiled
SDXL = 4 * 2_567_463_684  # bytes of its denoiser in float32


def export_model(workdir: pathlib.Path, out: pathlib.Path, form: str, dtype: str) -> tuple[int, int]:
    """The most memory that an export took beyond what libraries and shapes take, and all that the process had."""
    open_stored(workdir)
    _, growth = most_growth(lambda: export(workdir, out, form=form, dtype=dtype))
    return growth, memory("VmHWM")


def import_shards(config: ConfigDict, workdir: pathlib.Path) -> tuple[int, int, int]:
    """The bytes of the whole denoiser, those that this process holds, and the most memory that it took until it did.

    Each of its shards is compared with the file, as another library reads it.
    """
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    for module in ("sampling.reach", "training.evaluators", "training.objective"):  # which a task imports on its way
        importlib.import_module(f"offsetjax.{module}")
    (_, params), growth = most_growth(lambda: begin(config, workdir))
    [file] = (pathlib.Path(config.model.pretrained) / "unet").glob("*.safetensors")
    size = held = 0
    with safetensors.safe_open(file, "np") as expected:
        for path, leaf in flatten_dict(params["unet"]).items():
            whole, size = from_torch(path, expected.get_tensor(torch_name(path))), size + leaf.nbytes
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[shard.index])
                held += shard.data.nbytes
    return size, held, growth


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """A model of 200 MB."""
    folder = tmp_path_factory.mktemp("wide")
    write_model(folder, wide_config())
    yield folder
    shutil.rmtree(folder)


def test_a_model_is_read_and_written_without_a_second_copy_of_it(wide: pathlib.Path, tmp_path: pathlib.Path) -> None:
    size, growth = call(import_model, run_config(wide), tmp_path / "run")
    print(f"{size / MB:.0f} MB read with {growth / MB:.0f} MB more memory")
    assert 180 * MB < size < 220 * MB
    assert growth < 1.3 * size + LIBRARIES
    growth, _ = call(export_model, tmp_path / "run", tmp_path / "out.safetensors", "single_file", "float32")
    print(f"written with {growth / MB:.0f} MB more memory")
    assert growth < 0.7 * size
    shutil.rmtree(tmp_path)


def test_each_of_two_processes_reads_its_shards_alone(wide: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = run_config(wide, mesh__data=1, mesh__fsdp=4)
    for size, held, growth in call_together([(import_shards, config, tmp_path / "run")] * 2, num_devices=2):
        print(f"{held / MB:.0f} of {size / MB:.0f} MB read with {growth / MB:.0f} MB more memory")
        assert 0.5 * size <= held < 0.51 * size
        assert growth < 1.3 * held + LIBRARIES < size


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_sdxl_is_read_and_written_without_a_second_copy_of_it(tmp_path: pathlib.Path) -> None:
    """In float32; needs 16 GB of memory and 32 GB of disk."""
    write_model(tmp_path / "model", family_config("stable_diffusion_xl"), "float16")
    config = run_config(tmp_path / "model")
    size, growth = call(import_model, config, tmp_path / "run", seconds=1800)
    print(f"{size / MB:.0f} MB read with {growth / MB:.0f} MB more memory, {growth / size:.2f} of it")
    assert size == SDXL
    assert growth <= 1.3 * size
    for form, dtype in (("diffusers", "float32"), ("single_file", "float16")):
        out = tmp_path / f"{form}.safetensors"
        growth, whole = call(export_model, tmp_path / "run", out, form, dtype, seconds=1800)
        print(f"written as {form} in {dtype} with {growth / MB:.0f} MB more memory, {whole / MB:.0f} MB in all")
        assert whole <= 2000 * MB
        (shutil.rmtree if out.is_dir() else pathlib.Path.unlink)(out)
    shutil.rmtree(tmp_path / "run")
    config.mesh.fsdp = 4
    results = call_together([(import_shards, config, tmp_path / "run")] * 2, num_devices=2, seconds=1800)
    for size, held, growth in results:
        print(f"{held / MB:.0f} of {size / MB:.0f} MB read with {growth / MB:.0f} MB more, {growth / held:.2f} of it")
        assert size == SDXL
        assert 0.5 * size <= held < 0.51 * size
        assert growth <= 1.3 * held
    shutil.rmtree(tmp_path)
