"""What the makers publish of accelerators, a device as jax counts them; and the shapes in which TPUs can be had.

Sources: the pages v4, v5e, v5p, v6e and tpu7x of docs.cloud.google.com/tpu/docs (peak, bandwidths; a TPU v4's DCN is
not on them), and NVIDIA's data sheets of the A100, H100 and H200 (dense bfloat16, SXM). The pages give a chip's ICI in
both directions together: 400 GB/s of a v5e, 1200 of a v5p, 800 of a v6e, 1200 of a TPU7x; here it is half of that, by
links. A v4's is from arXiv 2304.01433, table 4: 6 links of 50 GB/s each way. The HBM of a TPU is what its
compiler gives a program (libtpu 0.0.42, from the message with which it refuses a larger one), a little below the data
sheet's. A TPU7x chip is two devices; each has half of it. A clock is the peak divided by what the matrix units do in a
cycle.
"""

from typing import NamedTuple

GIB, GB, TERA = 2**30, 1e9, 1e12


class Chip(NamedTuple):
    """One device. Bandwidths are of one direction where there are two; None is what nobody publishes.

    Attributes:
        name: as in a topology's name, `v5e` in `v5e:4x4`; empty where it is no TPU.
        device_kind: what jax calls it, first of all.
        aliases: what else it may be called: jax knows several names of some.
        hbm_bytes: what a program may use.
        peak_flops: bfloat16, a second.
        hbm_bandwidth: bytes a second.
        ici_bandwidth: bytes a second that a device can send to its neighbours, over all links together.
        ici_links: to neighbours; two for each axis of the torus.
        dcn_bandwidth: bytes a second of a device's share of its host's network.
        clock_hz: of the matrix units.
        devices_per_chip: as jax counts devices.
        examples: names of topologies that can be had.
    """

    name: str
    device_kind: str
    hbm_bytes: float
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float | None = None
    ici_links: int = 0
    dcn_bandwidth: float | None = None
    clock_hz: float | None = None
    devices_per_chip: int = 1
    examples: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


CHIPS = (
    Chip(
        name="v4",
        device_kind="TPU v4",
        hbm_bytes=30.75 * GIB,
        peak_flops=275 * TERA,
        hbm_bandwidth=1228 * GB,
        ici_bandwidth=6 * 50 * GB,
        ici_links=6,
        clock_hz=1.05e9,
        examples=("v4:2x2x1", "v4:2x2x2", "v4:2x2x4", "v4:4x4x4", "v4:4x4x8"),
    ),
    Chip(
        name="v5e",
        device_kind="TPU v5 lite",
        aliases=("TPU v5e",),
        hbm_bytes=15.75 * GIB,
        peak_flops=197 * TERA,
        hbm_bandwidth=819 * GB,
        ici_bandwidth=4 * 50 * GB,
        ici_links=4,
        dcn_bandwidth=25 / 8 * GB,
        clock_hz=1.5e9,
        examples=("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    ),
    Chip(
        name="v5p",
        device_kind="TPU v5",
        aliases=("TPU v5p",),
        hbm_bytes=95.74 * GIB,
        peak_flops=459 * TERA,
        hbm_bandwidth=2765 * GB,
        ici_bandwidth=6 * 100 * GB,
        ici_links=6,
        dcn_bandwidth=50 / 8 * GB,
        clock_hz=1.75e9,
        examples=("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8"),
    ),
    Chip(
        name="v6e",
        device_kind="TPU v6 lite",
        aliases=("TPU v6e",),
        hbm_bytes=31.25 * GIB,
        peak_flops=918 * TERA,
        hbm_bandwidth=1638 * GB,
        ici_bandwidth=4 * 100 * GB,
        ici_links=4,
        dcn_bandwidth=100 / 8 * GB,
        clock_hz=1.75e9,
        examples=("v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16"),
    ),
    Chip(
        name="tpu7x",
        device_kind="TPU7x",
        hbm_bytes=94.75 * GIB,
        peak_flops=2307 / 2 * TERA,
        hbm_bandwidth=7380 / 2 * GB,
        ici_bandwidth=6 * 100 / 2 * GB,
        ici_links=6,
        dcn_bandwidth=100 / 8 / 2 * GB,
        devices_per_chip=2,
        examples=("tpu7x:2x2x1", "tpu7x:2x2x2", "tpu7x:2x2x4", "tpu7x:4x4x4"),
    ),
    Chip("", "NVIDIA A100-SXM4-40GB", 40 * GB, 312 * TERA, 1555 * GB),
    Chip("", "NVIDIA A100-SXM4-80GB", 80 * GB, 312 * TERA, 2039 * GB),
    Chip("", "NVIDIA H100 80GB HBM3", 80 * GB, 989 * TERA, 3350 * GB),
    Chip("", "NVIDIA H200", 141 * GB, 989 * TERA, 4800 * GB),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls so; None where its figures are not known."""
    return next((chip for chip in CHIPS if device_kind in (chip.device_kind, *chip.aliases)), None)


def chip_named(generation: str) -> Chip | None:
    """The TPU of this generation, such as `v5e`."""
    return next((chip for chip in CHIPS if chip.name and chip.name == generation), None)
