"""From costs to times, against arithmetic by hand."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from offsetjax.chips import chip_named
from offsetjax.config import default_config
from offsetjax.plan.compile import Compiled, Request
from offsetjax.plan.estimate import Plan, estimate
from tests.plan import topology

pytest.importorskip("libtpu")
N, GB = 2048, 1e9


def planned(name: str, shape: tuple[int, int], function: Any, spec: P, out: P, *, slices: int = 1) -> Plan:
    """The plan of a function of one float32 matrix on a mesh with the axes x and y."""
    options = {"num_slices": slices} if slices > 1 else {}
    mesh = topology.mesh(name, shape, ("x", "y"), **options)
    sharded = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    text = (
        jax.jit(sharded, in_shardings=NamedSharding(mesh, spec))
        .lower(jax.ShapeDtypeStruct((N, N), jnp.float32))
        .compile()
        .as_text()
    )
    devices = mesh.devices.ravel()
    known = {
        "mesh": dict(mesh.shape),
        "num_devices": len(devices),
        "device_kind": devices[0].device_kind,
        "coordinates": [list(device.coords) for device in devices],
        "kernels": [],
        "trained_parameters": 0,
        "frozen_parameters": 0,
        **{f"{part}_bytes": 0 for part in ("params", "opt_state", "ema_params", "frozen", "batch")},
        "checkpoint_bytes_in_all": 0,
        "global_batch_size": 64,
        "steps": 3600,
        "model_flops": 10**12,
        "key": "",
        "versions": ["", "", ""],
    }
    request = Request(default_config(), name, slices, False, pathlib.Path())
    return estimate(request, Compiled(known, text, 2**30, None, 0.0, False))


@pytest.mark.parametrize(
    ("name", "shape", "axis", "ways"),
    [
        ("v5e:2x2", (2, 2), "y", 1),  # neighbours along one axis, that is not closed to a ring
        ("v5e:2x4", (2, 4), "y", 2),  # a square
        ("v5p:2x2x4", (4, 4), "y", 2),
        ("v5p:2x2x4", (4, 4), "x", 2),  # the side of a cube is closed by optical switches
        ("v5p:2x2x4", (16, 1), "x", 4),
    ],
)
def test_a_gather_takes_as_long_as_its_links_allow(name: str, shape: tuple[int, int], axis: str, ways: int) -> None:
    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, axis, axis=0, tiled=True)

    plan = planned(name, shape, gather, P(axis), P())
    chip = chip_named(name.partition(":")[0])
    assert chip is not None and chip.ici_bandwidth is not None
    parties = shape["xy".index(axis)]
    sent = 4 * N * N * (parties - 1) / parties
    assert plan["seconds"]["ici"] == pytest.approx(sent / (ways * chip.ici_bandwidth / chip.ici_links))


def test_a_reduction_between_four_slices() -> None:
    plan = planned("v5e:2x2", (4, 4), lambda x: jax.lax.psum(x, "x"), P("x", "y"), P(None, "y"), slices=4)
    (exchange,) = plan["collectives"]
    assert (exchange["over"], exchange["bytes"]) == ("dcn", 4 * N * N // 16)
    # A ring of four: each share goes round once to be added up, and once more to be known.
    assert plan["seconds"]["dcn"] == pytest.approx(2 * 3 / 4 * exchange["bytes"] / (25 / 8 * GB))


def test_what_follows_from_a_step() -> None:
    plan = planned("v5e:2x2", (2, 2), lambda x: jnp.sin(x @ x.T) @ x, P("x"), P("x"))
    seconds = plan["seconds"]
    matrix = 2 * 2 * (N // 2) ** 2 * N / 197e12
    assert seconds["matrix"] == pytest.approx(matrix)
    assert seconds["roofline"] >= max(seconds["matrix"], seconds["hbm"])
    # This one is compiled to the end: the compiler's own estimate is known, and a little above the roofline.
    assert seconds["roofline"] < seconds["cycles"] < 1.5 * seconds["roofline"]
    (step, _) = plan["step_seconds"]
    assert step == seconds["cycles"]
    assert plan["images_per_second"][0] == pytest.approx(64 / step)
    assert plan["mfu"][0] == pytest.approx(1e12 / (4 * 197e12 * step))
    assert plan["hours"][0] == pytest.approx(step)  # of 3600 steps
    assert plan["chip_hours"][0] == pytest.approx(4 * step)
    assert plan["bytes_per_device"]["fits"]


def test_a_chip_of_two_devices_counts_once() -> None:
    plan = planned("tpu7x:2x2x1", (2, 4), jnp.sin, P("x"), P("x"))
    assert (plan["devices"], plan["chips"]) == (8, 4)
