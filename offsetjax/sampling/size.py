"""The size of the pictures that a config draws."""

from ml_collections import ConfigDict

from offsetjax.data.buckets import Size, check_sizes, parse_size, square
from offsetjax.models.resolve import resolution_unit
from offsetjax.models.task import task_of

_FIELD = "sample.size"


def drawn_size(sample: ConfigDict, resolution: int) -> Size:
    """`sample.size`, or the square of `data.resolution`.

    Raises:
        UserError: it is none.
    """
    return parse_size(sample.size, _FIELD) if sample.size else square(resolution)


def check_drawn_size(config: ConfigDict) -> None:
    """Raises a UserError where the networks cannot draw pictures of `sample.size`."""
    if config.sample.size and task_of(config).denoises:
        check_sizes([drawn_size(config.sample, config.data.resolution)], resolution_unit(config), _FIELD)
