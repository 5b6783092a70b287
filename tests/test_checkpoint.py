"""A checkpoint holds the state bit for bit, on any mesh, with the data's position; a damaged one is refused."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree

from offsetjax import checkpoint, sharding
from offsetjax.errors import UserError

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
    return jax.device_put(jax.tree.map(jnp.asarray, state), sharding.shardings(mesh, state))


def _like(data: int = 1, fsdp: int = 1) -> PyTree:
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, _state()))
    return checkpoint.abstract(abstract, sharding.shardings(sharding.mesh_of(data=data, fsdp=fsdp), abstract))


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
    with checkpoint.open_checkpoints(tmp_path) as manager, pytest.raises(UserError, match="it has none"):
        checkpoint.restore(manager, _like())


@pytest.mark.parametrize("damage", ["removed", "emptied", "halved", "zeroed"])
def test_a_damaged_file_is_refused_or_harmless(saved: pathlib.Path, tmp_path: pathlib.Path, damage: str) -> None:
    whole = saved / "checkpoints" / "4"
    messages = []
    for number, file in enumerate(sorted(path for path in whole.rglob("*") if path.is_file() and path.stat().st_size)):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        broken = workdir / "checkpoints" / "4" / file.relative_to(whole)
        content = broken.read_bytes()
        broken.write_bytes({"halved": content[: len(content) // 2], "zeroed": bytes(len(content))}.get(damage, b""))
        if damage == "removed":
            broken.unlink()
        try:
            with checkpoint.open_checkpoints(workdir) as manager:
                state, position = checkpoint.restore(manager, _like())
        except UserError as error:
            messages.append(str(error))
        else:
            assert _bytes(state) == _bytes(_state(4)), file
            assert position == DATA, file
    assert messages
    assert all(message.startswith("checkpoint: ") and "\n" not in message for message in messages), messages


def test_a_stray_directory_is_refused_by_its_name(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "900").mkdir()
    try:
        with checkpoint.open_checkpoints(tmp_path / "run") as manager:
            state, _ = checkpoint.restore(manager, _like())
    except UserError as error:
        assert "checkpoints/900 cannot be read" in str(error)  # noqa: PT017 — being passed over is right, too
    else:
        assert int(state["step"]) == 4


def test_a_checkpoint_of_another_model_is_refused(saved: pathlib.Path) -> None:
    like = _like()
    like["dense"]["kernel"] = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=like["dense"]["bias"].sharding)
    with checkpoint.open_checkpoints(saved) as manager, pytest.raises(UserError, match="cannot be read"):
        checkpoint.restore(manager, like)
