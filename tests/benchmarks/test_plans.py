"""What a step takes of a TPU, by plans: `launch/local.sh test tests/benchmarks -m slow -s -k plans` prints it all.

It takes hours, and keeps what it has compiled where `offsetjax plan` does, so that it continues where it was stopped.
"""

import pathlib
from typing import NamedTuple

import pytest

from offsetjax.config import load_config
from offsetjax.plan.command import plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

GIB = 2**30
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


class Row(NamedTuple):
    """A setting, and the most that it may take.

    Attributes:
        topology: of 16 chips.
        batch: of a chip.
        most_gib: of a chip's memory.
    """

    config: str
    resolution: int
    topology: str
    batch: int
    remat: str
    attention: str = "auto"
    most_gib: float | None = None


ROWS = (
    Row("sd21_offset", 512, "v5e:4x4", 8, "none"),
    Row("sd21_offset", 512, "v5e:4x4", 8, "attention"),
    Row("sd21_offset", 512, "v5e:4x4", 8, "blocks", most_gib=5),
    Row("sd21_offset", 512, "v5e:4x4", 8, "full"),
    Row("sd21_offset", 512, "v5e:4x4", 8, "blocks", "xla"),
    Row("sd21_offset", 512, "v5p:2x2x4", 8, "none"),
    Row("sdxl_offset", 1024, "v5p:2x2x4", 4, "none"),
    Row("sdxl_offset", 1024, "v5p:2x2x4", 4, "blocks", most_gib=7),
    Row("sdxl_offset", 1024, "v5p:2x2x4", 32, "blocks"),
    Row("sdxl_offset", 1024, "v5p:2x2x4", 4, "blocks", "xla"),
    Row("sdxl_offset", 1024, "v5e:4x4", 4, "blocks"),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row[:6])))
def test_what_a_step_takes_of_a_chip(row: Row, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("libtpu")
    settings = {
        "data.resolution": row.resolution,
        "train.global_batch_size": 16 * row.batch,
        "model.remat": row.remat,
        "model.attention": row.attention,
    }
    config = load_config(str(CONFIGS / f"{row.config}.py"), [(key, str(value)) for key, value in settings.items()])
    with capsys.disabled():
        (found,) = plan(config, [row.topology], searches=True)
    memory = found["bytes_per_device"]
    gathered = sum(each["bytes"] for each in found["collectives"] if each["kind"] == "all-gather")
    assert memory["fits"]
    assert row.most_gib is None or memory["total"] <= row.most_gib * GIB
    # Of the parameters in bfloat16: forward and backward, and once more where they are computed again.
    assert gathered <= (2.2 if row.remat == "none" else 3.3) * 2 * found["parameters"]["trained"]
    assert found["largest_batch"]["batch_per_device"] >= row.batch
