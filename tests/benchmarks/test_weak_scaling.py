"""What a device holds, computes and exchanges as devices are added, each with as many pictures: from compiled steps.

`launch/local.sh test tests/benchmarks -m slow -s -k weak` prints it. The devices are virtual: there is no time in it.
"""

import pathlib
from typing import Any

import pytest

from offsetjax.plan.compile import Request, compile_step
from offsetjax.plan.estimate import estimate
from tests.tiny import tiny_config

DEVICES, BATCH = (1, 2, 4, 8), 4  # pictures a device


def _row(axis: str, devices: int, cache_dir: pathlib.Path) -> dict[str, Any]:
    config = tiny_config(train__global_batch_size=BATCH * devices, model__unet__block_out_channels=(64,))
    config.mesh.update({"data": 1, "fsdp": 1, axis: devices})
    request = Request(config, f"cpu:{devices}", 1, False, cache_dir)
    plan = estimate(request, compile_step(request, lambda phase: None))
    memory, exchanged = plan["bytes_per_device"], [each for each in plan["collectives"] if each["devices"] != 1]
    return {
        "params": memory["params"] + memory["ema_params"],
        "optimizer": memory["opt_state"],
        "temporary": memory["temporary"],
        "flops": plan["flops_per_device"]["compiled"],
        "exchanged": {each["kind"]: (each["count"], each["bytes"]) for each in exchanged},
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("axis", ["fsdp", "data"])
def test_a_device_has_no_more_to_do_among_many(
    axis: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {devices: _row(axis, devices, tmp_path) for devices in DEVICES}
    with capsys.disabled():
        for devices, row in rows.items():
            exchanged = ", ".join(f"{n} {kind} {size / 1e6:.2f} MB" for kind, (n, size) in row["exchanged"].items())
            print(f"\n{axis}={devices}  params and average {row['params'] / 1e6:.2f} MB", end="")
            print(f"  optimizer {row['optimizer'] / 1e6:.2f} MB  temporary {row['temporary'] / 1e6:.1f} MB", end="")
            print(f"  {row['flops'] / 1e9:.2f} GFLOP  {exchanged or 'no exchange'}", end="")
        print()
    alone, *several = rows.values()
    assert not alone["exchanged"]
    for devices, row in zip(DEVICES[1:], several, strict=True):
        assert row["flops"] == alone["flops"]
        assert row["exchanged"] == several[0]["exchanged"]
        assert row["temporary"] == pytest.approx(alone["temporary"], rel=0.1)
        for part in ("params", "optimizer"):  # a share, but for what is too small to be split; or a copy
            share = alone[part] / devices if axis == "fsdp" else alone[part]
            assert share <= row[part] < 1.1 * share
