"""The families that `model.family` can name, and the one that a config is of; `models/family.py` says what one is."""

from collections.abc import Mapping
from typing import Any

from offsetjax.registry import Registry

_HERE = "offsetjax.models"
FAMILIES: Registry[Any] = Registry(
    "model.family",
    "offsetjax.families",
    {
        "sd1": f"{_HERE}.stable_diffusion:SD1",
        "sd2": f"{_HERE}.stable_diffusion:SD2",
        "sdxl": f"{_HERE}.stable_diffusion_xl:SDXL",
    },
)


def family_of_values(values: Mapping[str, Any]) -> Any:
    """The family that a config names, or else the one whose architecture it has.

    Args:
        values: of the config, by path.

    Raises:
        UserError: no family has that name.
    """
    if values["model.family"]:
        return FAMILIES[values["model.family"]]
    return next(family for name in FAMILIES.names if (family := FAMILIES[name]).is_like(values))
