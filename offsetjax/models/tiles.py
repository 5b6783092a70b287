"""Pictures larger than a chip's memory takes at once, decoded in tiles that overlap by a quarter."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float

_OVERLAP = 0.25  # of a tile


def decode_in_tiles(
    decode: Callable[[Float[Array, "b c k l"]], Float[Array, "b 3 K L"]],
    latents: Float[Array, "b c h w"],
    downscale: int,
    tile: int,
) -> Float[np.ndarray, "b 3 H W"]:
    """The pixels of latents, of one tile after the other; where tiles overlap, one is faded into the next.

    Normalisations see a tile and not the whole picture, whose colours may then differ a little.

    Args:
        decode: gives the pixels of latents; compiled by the caller, it is called with at most four sizes.
        downscale: pixels a latent pixel, on a side.
        tile: latent pixels on a side; a side of at most that is not cut.
    """
    height, width = latents.shape[-2:]
    strips = []
    for top in _starts(height, tile):
        pieces = [
            np.asarray(decode(latents[..., top : top + tile, left : left + tile])) for left in _starts(width, tile)
        ]
        strips.append(_joined(pieces, _starts(width, tile), downscale, axis=-1))
    return _joined(strips, _starts(height, tile), downscale, axis=-2)


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles begin, until one reaches the end."""
    step = max(int(tile * (1 - _OVERLAP)), 1)
    return list(range(0, max(length - tile, 0) + step, step))


def _joined(pieces: list[np.ndarray], starts: list[int], downscale: int, axis: int) -> np.ndarray:
    result, *others = pieces
    for piece, start in zip(others, starts[1:], strict=True):
        shared = result.shape[axis] - start * downscale
        kept, old = np.split(result, [start * downscale], axis)
        new, added = np.split(piece, [shared], axis)
        fade = (np.arange(shared, dtype=np.float32) / shared).reshape((-1,) + (1,) * (-1 - axis))
        result = np.concatenate([kept, old * (1 - fade) + new * fade, added], axis)
    return result
