"""The size of the pictures that a config draws."""

from ml_collections import ConfigDict

from offsetjax.data.buckets import Size, check_sizes, parse_size, square
from offsetjax.models.pipeline import Pipeline
from offsetjax.models.resolve import resolution_unit
from offsetjax.models.task import task_of

_FIELD = "sample.size"


def drawn_size(config: ConfigDict) -> Size:
    """`sample.size`, or the square of `data.resolution`.

    Raises:
        UserError: it is none.
    """
    return parse_size(config.sample.size, _FIELD) if config.sample.size else square(config.data.resolution)


def check_drawn_size(config: ConfigDict) -> None:
    """Raises a UserError where the networks cannot draw pictures of `sample.size`."""
    if config.sample.size and task_of(config).denoises:
        check_sizes([drawn_size(config)], resolution_unit(config), _FIELD)


def latent_shape(pipeline: Pipeline, config: ConfigDict) -> tuple[int, int, int]:
    """`(c, h, w)` of the pictures that a config draws."""
    (width, height), vae = drawn_size(config), pipeline.autoencoder
    return vae.latent_channels, height // vae.downscale, width // vae.downscale
