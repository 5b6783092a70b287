"""The brightness of pictures, 0 black and 1 white: of a data set, of what a model draws, and how far they are apart."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float
from scipy.stats import wasserstein_distance

from offsetjax.data.buckets import Size, square
from offsetjax.data.images import UnreadableImage
from offsetjax.data.source import Source, unreadable
from offsetjax.errors import UserError

# A brightness below or above these is near black or near white: a grey model draws no such picture.
NEAR_BLACK, NEAR_WHITE = 0.1, 0.9

# Pictures of a data set: enough for a standard deviation to two digits, and seconds to read.
MEASURED_AT_MOST = 2048


def data_brightness(
    source: Source,
    resolution: int,
    at_most: int = MEASURED_AT_MOST,
    may_be_bad: bool = False,
    size_of: Callable[[int], Size | None] | None = None,
) -> Float[np.ndarray, " n"]:
    """The brightness of a data set's pictures, cropped as for training; of `at_most`, evenly spaced, where more.

    Args:
        may_be_bad: records that cannot be read are left out, where one can.
        size_of: the size that a picture is brought to, by its number, None where it is left out; by default squares.

    Raises:
        UserError: a record that cannot be read.
    """
    sizes = {index: size_of(index) if size_of else square(resolution) for index in evenly_spaced(source, at_most)}

    def measure(index: int, size: Size) -> float | UserError:
        try:
            return source[index].brightness(size)
        except UnreadableImage as error:
            return unreadable(source, index, error)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:  # decoding a picture lets other threads run
        taken = [(index, size) for index, size in sizes.items() if size]
        found = list(pool.map(measure, *zip(*taken, strict=True))) if taken else []
    bad = [each for each in found if isinstance(each, UserError)]
    if bad and (not may_be_bad or len(bad) == len(found)):
        raise bad[0]
    return np.array([each for each in found if not isinstance(each, UserError)])


def evenly_spaced(source: Source, at_most: int = MEASURED_AT_MOST) -> list[int]:
    """The records that are measured."""
    return np.linspace(0, len(source) - 1, min(len(source), at_most)).astype(int).tolist()


def compare(drawn: Sequence[float], data: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Mean, spread and extremes of what was drawn, and its Wasserstein distance (W1) to the data's distribution."""
    values = np.asarray(drawn)
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "near_black": float((values < NEAR_BLACK).mean()),
        "near_white": float((values > NEAR_WHITE).mean()),
        "wasserstein": float(wasserstein_distance(values, data)),
    }
