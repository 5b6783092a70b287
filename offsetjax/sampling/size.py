"""The size of the pictures that a config draws."""

from ml_collections import ConfigDict

from offsetjax.data.buckets import Size, check_sizes, parse_size, square

_FIELD = "sample.size"


def drawn_size(sample: ConfigDict, resolution: int) -> Size:
    """`sample.size`, or the square of `data.resolution`.

    Raises:
        UserError: it is none.
    """
    return parse_size(sample.size, _FIELD) if sample.size else square(resolution)


def check_drawn_size(sample: ConfigDict, unit: int) -> None:
    """Raises a UserError where networks cannot draw pictures of `sample.size`.

    Args:
        unit: what the sides of pictures must be a multiple of for them, in pixels.
    """
    if sample.size:
        check_sizes([parse_size(sample.size, _FIELD)], unit, _FIELD)
