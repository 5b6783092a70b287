"""From costs to times, against arithmetic by hand; and how the times are shown."""

import io
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from offsetjax.config import default_config
from offsetjax.parallel.chips import Chip, chip_named, chip_of
from offsetjax.plan.compile import Compiled, Request
from offsetjax.plan.estimate import Plan, _bandwidth, _part, estimate
from offsetjax.plan.show import show
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
        "parts": [],
        "mesh": dict(mesh.shape),
        "num_devices": len(devices),
        "device_kind": devices[0].device_kind,
        "coordinates": [list(device.coords) for device in devices],
        "kernels": [],
        "trained_parameters": 0,
        "frozen_parameters": 0,
        "idle_bytes": 0,
        **{f"{part}_bytes": 0 for part in ("params", "opt_state", "ema_params", "frozen", "batch")},
        "checkpoint_bytes_in_all": 0,
        "opt_state_bytes_in_all": 0,
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
        ("v5p:2x2x4", (4, 4), "x", 1),  # an axis of 4, which nothing closes: the slice is no cube
        ("v5p:2x2x4", (16, 1), "x", 3),
        ("v5p:4x4x4", (4, 16), "x", 2),  # the sides of a cube are closed by optical switches
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


@pytest.mark.parametrize(
    ("name", "shape", "group", "ways"),
    [
        ("v4", (4, 4, 4), (4, 1, 1), 2),
        ("v5p", (4, 4, 8), (4, 4, 8), 6),
        ("v5p", (4, 4, 8), (2, 4, 1), 3),  # half of a ring is none
        ("v5p", (2, 4, 4), (1, 4, 1), 1),
        ("v5p", (2, 4, 4), (2, 4, 4), 3),
        ("tpu7x", (4, 4, 4), (1, 4, 4), 4),
        ("tpu7x", (2, 2, 4), (1, 1, 4), 1),
        ("v5e", (16, 16, 1), (16, 16, 1), 4),
        ("v5e", (8, 16, 1), (8, 1, 1), 1),
        ("v5e", (8, 16, 1), (1, 16, 1), 2),
        ("v6e", (16, 16, 1), (4, 1, 1), 1),
        ("v6e", (4, 4, 1), (4, 4, 1), 2),
    ],
)
def test_what_closes_to_a_ring_has_two_ways(
    name: str, shape: tuple[int, ...], group: tuple[int, ...], ways: int
) -> None:
    chip = chip_named(name)
    assert chip is not None and chip.ici_bandwidth is not None
    coordinates = [list(place) for place in np.ndindex(*shape)]
    members = [at for at, place in enumerate(coordinates) if all(np.less(place, group))]
    assert _bandwidth(tuple(members), coordinates, chip) == pytest.approx(ways * chip.ici_bandwidth / chip.ici_links)


@pytest.mark.parametrize(("chip", "gigabytes"), [("v4", 300), ("v5e", 200), ("v5p", 600), ("v6e", 400), ("tpu7x", 600)])
def test_links_are_counted_one_way(chip: str, gigabytes: int) -> None:
    """A chip's are published as 6 links of 50 GB/s (v4), and, both ways together, 400, 1200, 800 and 1200 GB/s."""
    known = chip_named(chip)
    assert known is not None and known.ici_bandwidth == gigabytes * GB / known.devices_per_chip


def test_a_chip_goes_by_all_of_its_names() -> None:
    info = pytest.importorskip("jax._src.pallas.mosaic.tpu_info")  # which knows them
    names = [f"TPU {name}" for name in ("v4", "v5", "v5p", "v5e", "v5 lite", "v6e", "v6 lite")]
    generations: dict[Any, set[Chip | None]] = {}
    for name in [*names, "TPU7x"]:
        generations.setdefault(info.chip_version_from_device_kind(name), set()).add(chip_of(name))
    assert len(generations) == 5
    assert all(len(chips) == 1 and None not in chips for chips in generations.values())


def test_a_reduction_between_four_slices() -> None:
    plan = planned("v5e:2x2", (4, 4), lambda x: jax.lax.psum(x, "x"), P("x", "y"), P(None, "y"), slices=4)
    (exchange,) = plan["collectives"]
    assert (exchange["over"], exchange["bytes"]) == ("dcn", 4 * N * N // 16)
    # A ring of four: each share goes round once to be added up, and once more to be known.
    assert plan["seconds"]["dcn"] == pytest.approx(2 * 3 / 4 * exchange["bytes"] / (25 / 8 * GB))


def test_a_network_whose_speed_is_not_known_sets_no_end() -> None:
    plan = planned("v4:2x2x1", (2, -1), lambda x: jax.lax.psum(x, "x"), P("x", "y"), P(None, "y"), slices=2)
    assert {each["over"] for each in plan["collectives"]} == {"dcn"}
    assert plan["seconds"]["dcn"] is None
    for figure in ("step_seconds", "images_per_second", "mfu", "hours", "chip_hours"):
        fastest, slowest = plan[figure]
        assert fastest > 0 and slowest is None
    written = io.StringIO()
    Console(width=120, file=written).print(show([plan, plan]))
    assert written.getvalue().count(" to – (not known)") == 2 * 5 + 2 * 5  # in full, and in the table of both


def test_what_nothing_is_sent_over_takes_no_time() -> None:
    plan = planned("v4:2x2x1", (2, -1), lambda x: jax.lax.psum(x, "x"), P("x", "y"), P(None, "y"))
    assert plan["seconds"]["dcn"] == 0
    computing = max(plan["seconds"]["roofline"], plan["seconds"]["cycles"] or 0)
    assert plan["step_seconds"][1] == pytest.approx(computing + plan["seconds"]["ici"])


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


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jvp(unet)/Net/up_blocks_0/resnets_1/conv1", "unet forward"),
        ("unet/Net/up_blocks_0/words/conv1", "unet forward"),
        ("words/Net/layers_0", "words forward"),
        ("transpose(jvp(unet))/jvp(unet)/FlaxResnetBlock2D/conv1", "unet backward"),
        ("transpose(jvp(unet))/rematted_computation/FlaxResnetBlock2D/conv1", "unet again"),
        ("transpose(jvp(unet))/while/body/closed_call/jvp(FlaxBasicTransformerBlock)/to_q", "unet again"),
        ("transpose(jvp(unet))/while/body/closed_call/transpose(jvp(FlaxBasicTransformerBlock))/to_q", "unet backward"),
        ("mul_of_unet/sin", "other"),
    ],
)
def test_operations_belong_to_a_part_and_a_pass(name: str, part: str) -> None:
    """By such names as jax gives them, with and without jax.checkpoint and loops that are computed again."""
    attributes = f'metadata={{op_name="jit(train_step)/shard_map/{name}/dot_general"}}'
    assert _part(attributes, ["unet", "words"]) == part
    assert _part(attributes, []) == "other"
