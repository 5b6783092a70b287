"""A checkpoint holds the state bit for bit, on any mesh, with the data's position; a damaged one is refused."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jaxtyping import PyTree

from offsetjax.errors import UserError
from offsetjax.parallel import sharding
from offsetjax.storage import arrays, checkpoint
from tests.launch.fake_bucket import BUCKET, bucket, run_on

DATA = {"next_batch": 4, "fingerprint": {"seed": 0, "split": "train"}}


def _state(seed: int = 0) -> PyTree:
    rng = np.random.default_rng(seed)
    return {
        "step": np.int32(seed),
        "dense": {
            "kernel": rng.normal(size=(64, 32)).astype(np.float32),
            "bias": rng.normal(size=32).astype(np.float32),
        },
    }


def _place(state: PyTree, data: int, fsdp: int) -> PyTree:
    mesh = sharding.mesh_of(data=data, fsdp=fsdp)
    return jax.device_put(jax.tree.map(jnp.asarray, state), sharding.shardings(mesh, (), state))


def _like(data: int = 1, fsdp: int = 1) -> PyTree:
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, _state()))
    return checkpoint.abstract(abstract, sharding.shardings(sharding.mesh_of(data=data, fsdp=fsdp), (), abstract))


def _bytes(tree: PyTree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A work directory with step 4, written from a mesh of 8 x 1."""
    workdir = tmp_path_factory.mktemp("saved") / "work dir"
    with checkpoint.open_checkpoints(workdir) as manager:
        checkpoint.save(manager, 4, _place(_state(4), 8, 1), DATA)
    return workdir


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (8, 1), (1, 8), (2, 4)])
def test_a_checkpoint_is_restored_on_any_mesh(saved: pathlib.Path, data: int, fsdp: int) -> None:
    with checkpoint.open_checkpoints(saved) as manager:
        state, position = checkpoint.restore(manager, _like(data, fsdp))
    assert position == DATA
    assert _bytes(state) == _bytes(_state(4))
    kernel = state["dense"]["kernel"]
    assert len(kernel.sharding.device_set) == data * fsdp
    assert kernel.addressable_shards[0].data.size == 64 * 32 / fsdp


def test_the_state_that_is_saved_may_be_donated_at_once(tmp_path: pathlib.Path) -> None:
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 1, state), donate_argnums=0)
    expected = {}
    with checkpoint.open_checkpoints(tmp_path) as manager:
        for number in range(1, 4):
            large = {"kernel": np.random.default_rng(number).normal(size=(1024, 1024)).astype(np.float32)}
            state = _place(large, 2, 4)
            checkpoint.save(manager, number, state, DATA)
            step(state)["kernel"].block_until_ready()
            expected[number] = _bytes(large)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _place(large, 1, 1))
    with checkpoint.open_checkpoints(tmp_path) as manager:
        for number, values in expected.items():
            assert _bytes(checkpoint.restore(manager, like, number)[0]) == values


def test_the_newest_are_kept_and_restored(tmp_path: pathlib.Path) -> None:
    with checkpoint.open_checkpoints(tmp_path, max_to_keep=2) as manager:
        for step in (2, 4, 6, 7):
            checkpoint.save(manager, step, _place(_state(step), 1, 1), {"next_batch": step})
    with checkpoint.open_checkpoints(tmp_path) as manager:
        assert sorted(manager.all_steps()) == [6, 7]
        state, position = checkpoint.restore(manager, _like())
        assert (int(state["step"]), position) == (7, {"next_batch": 7})
        state, position = checkpoint.restore(manager, _like(), 6)
        assert (int(state["step"]), position) == (6, {"next_batch": 6})


@pytest.mark.parametrize("step", [3, 0, 40])
def test_an_unknown_step_is_refused_with_those_there_are(saved: pathlib.Path, step: int) -> None:
    with (
        checkpoint.open_checkpoints(saved) as manager,
        pytest.raises(UserError, match=rf"has no step {step} \(it has 4\)"),
    ):
        checkpoint.restore(manager, _like(), step)


def test_no_checkpoint_at_all_is_refused(tmp_path: pathlib.Path) -> None:
    with checkpoint.open_checkpoints(tmp_path) as manager, pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.restore(manager, _like())


def _resume(manager: ocp.CheckpointManager) -> bool:
    state, position = checkpoint.restore(manager, _like())
    return _bytes(state) == _bytes(_state(4)) and position == DATA


def _read_part(manager: ocp.CheckpointManager) -> bool:
    return _bytes(checkpoint.restore_part(manager, "dense", _like(2, 4)["dense"])) == _bytes(_state(4)["dense"])


def _read_tensors(manager: ocp.CheckpointManager) -> bool:
    tensors = arrays.open_part(manager, "dense", _like()["dense"])
    return _bytes(jax.tree.map(lambda tensor: tensor(), tensors)) == _bytes(_state(4)["dense"])


def _read_rows(manager: ocp.CheckpointManager) -> bool:
    """The first row of each array, as an export of a sharded or a fused tensor reads."""
    tensors = arrays.open_part(manager, "dense", _like()["dense"])
    rows = jax.tree.map(lambda tensor: tensor.read((slice(0, 1),)), tensors)
    return _bytes(rows) == _bytes(jax.tree.map(lambda array: array[:1], _state(4)["dense"]))


# As a training, a sampling and an export read; true if they read what was written.
READERS = {"resume": _resume, "part": _read_part, "tensors": _read_tensors, "rows": _read_rows}


@pytest.mark.parametrize("reader", READERS)
def test_what_was_written_is_read(saved: pathlib.Path, reader: str) -> None:
    with checkpoint.open_checkpoints(saved) as manager:
        assert READERS[reader](manager)


RESTORE = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from offsetjax.storage import checkpoint
from offsetjax.errors import UserError
from tests.storage.test_checkpoint import READERS

for workdir in sys.argv[2:]:
    try:
        with checkpoint.open_checkpoints(workdir) as manager:
            print(json.dumps({"is_right": READERS[sys.argv[1]](manager)}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


def _restore_apart(workdirs: list[pathlib.Path], reader: str = "resume") -> list[dict[str, Any]]:
    """What becomes of each, in a process of its own.

    Where orbax cannot read one array, it leaves behind its reads of the others, which complain whenever they end.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-c", RESTORE, reader, *map(str, workdirs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


DAMAGES = {
    "removed": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_refused_in_one_line_or_harmless(
    saved: pathlib.Path, tmp_path: pathlib.Path, reader: str
) -> None:
    whole = saved / "checkpoints" / "4"
    files = sorted(path for path in whole.rglob("*") if path.is_file() and path.stat().st_size)
    workdirs = []
    for damage, hurt in DAMAGES.items():
        for number, file in enumerate(files):
            workdir = tmp_path / f"{damage} {number} {file.name}"
            shutil.copytree(saved, workdir)
            hurt(workdir / "checkpoints" / "4" / file.relative_to(whole))
            workdirs.append(workdir)
    outcomes = dict(zip((workdir.name for workdir in workdirs), _restore_apart(workdirs, reader), strict=True))
    errors = {name: outcome["error"] for name, outcome in outcomes.items() if "error" in outcome}
    assert all(error.startswith("checkpoint: ") and "\n" not in error for error in errors.values()), errors
    assert {name.split()[0] for name in errors} == set(DAMAGES)
    assert not [name for name, outcome in outcomes.items() if name not in errors and not outcome["is_right"]]


@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_is_found_and_its_array_named(saved: pathlib.Path, tmp_path: pathlib.Path, reader: str) -> None:
    whole = saved / "checkpoints" / "4"
    largest = max((path for path in whole.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    rng = np.random.default_rng(0)
    workdirs = []
    for number, (place, bit) in enumerate(zip(rng.integers(0, 64 * 32 * 4, 20), rng.integers(0, 8, 20), strict=True)):
        workdirs.append(tmp_path / str(number))
        shutil.copytree(saved, workdirs[-1])
        file = workdirs[-1] / "checkpoints" / "4" / largest.relative_to(whole)
        content = bytearray(file.read_bytes())
        start = bytes(content).index(_state(4)["dense"]["kernel"].tobytes())
        content[start + place] ^= 1 << bit
        file.write_bytes(content)
    outcomes = _restore_apart(workdirs, reader)
    assert all("dense/kernel is damaged" in outcome.get("error", "") for outcome in outcomes), outcomes


def test_a_stray_directory_is_refused_by_its_name_or_passed_over(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "900").mkdir()
    [outcome] = _restore_apart([tmp_path / "run"])
    assert outcome.get("is_right") or "checkpoints/900 cannot be read" in outcome["error"]


@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: pathlib.Path, reader: str) -> None:
    other = _state(4)
    other["dense"]["kernel"] = np.zeros((64, 16), np.float32)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save(manager, 4, _place(other, 1, 1), DATA)
    [outcome] = _restore_apart([tmp_path], reader)
    assert "checkpoints/4 cannot be read" in outcome["error"]


ON_A_BUCKET = """
import sys
import jax, numpy as np
from offsetjax.storage import arrays, checkpoint

place = sys.argv[1]
state = {"params": {"kernel": jax.numpy.arange(6.0)}, "step": jax.numpy.int32(4)}
like = checkpoint.abstract(state, jax.tree.map(lambda array: array.sharding, state))
with checkpoint.open_checkpoints(place) as manager:
    checkpoint.save(manager, 4, state, {"next_batch": 4})
assert checkpoint.newest_step(place) == 4
with checkpoint.open_checkpoints(place) as manager:
    restored, data = checkpoint.restore(manager, like)
    part = arrays.open_part(manager, "params", like["params"])
    np.testing.assert_array_equal(restored["params"]["kernel"], np.arange(6.0))
    np.testing.assert_array_equal(part["kernel"](), np.arange(6.0))
    assert data == {"next_batch": 4}
"""


def test_a_checkpoint_on_a_bucket_is_read_back(tmp_path: pathlib.Path) -> None:
    with bucket() as store:
        run_on(store, ON_A_BUCKET, f"gs://{BUCKET}/run", cwd=tmp_path)
        assert "run/checkpoints/4/state/manifest.ocdbt" in store.objects
    assert not [*tmp_path.iterdir()]
