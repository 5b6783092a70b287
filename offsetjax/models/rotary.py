"""Rotary positions (Su et al. 2021, arXiv 2104.09864), over one axis or several.

A position p turns the pair i of a head's channels by the angle p θ^(-2i/d). With several axes (row, column, ...) the
channels are divided among them, d to each. Positions and angles are float32 whatever the network computes in: bfloat16
distinguishes 385 of 512 positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """What each position turns each channel of a head by; the two channels of a pair have the same."""

    cosine: Float[Array, "*b n e"]
    sine: Float[Array, "*b n e"]


def rotation(
    positions: Int[Array | np.ndarray, "*b n a"], channels: Sequence[int], theta: float, *, is_interleaved: bool
) -> Rotation:
    """The rotation of each position.

    Args:
        positions: along each of `a` axes.
        channels: of a head, to each axis; even.
        is_interleaved: whether a pair is two neighbouring channels (Z-Image, FLUX.2), or one of each half of the head
            (Qwen3, with one axis).
    """
    places = jnp.asarray(positions, jnp.float32)
    angles = jnp.concatenate(
        [places[..., axis, None] * _frequencies(count, theta) for axis, count in enumerate(channels)], axis=-1
    )
    angles = jnp.repeat(angles, 2, axis=-1) if is_interleaved else jnp.concatenate([angles, angles], axis=-1)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def _frequencies(channels: int, theta: float) -> Float[np.ndarray, " c"]:
    exponents = np.arange(0, channels, 2, dtype=np.float64) / channels
    return (theta**-exponents).astype(np.float32)


def rotated(x: Float[Array, "b n k e"], by: Rotation, *, is_interleaved: bool) -> Float[Array, "b n k e"]:
    """Each head turned, in float32, and returned in its type.

    Args:
        by: of all examples alike, or with an axis of examples.
    """
    cosine, sine = (part if part.ndim == 3 else part[None] for part in by)
    full = x.astype(jnp.float32)
    if is_interleaved:
        # Not reshaped to pairs, which a TPU would lay out in tiles that are nearly empty.
        is_first = jnp.arange(x.shape[-1]) % 2 == 0
        other = jnp.where(is_first, -jnp.roll(full, -1, axis=-1), jnp.roll(full, 1, axis=-1))
    else:
        first, second = jnp.split(full, 2, axis=-1)
        other = jnp.concatenate([-second, first], axis=-1)
    return (full * cosine[:, :, None] + other * sine[:, :, None]).astype(x.dtype)


def grid_positions(height: int, width: int) -> Int[np.ndarray, "n 2"]:
    """Row and column of the places of a picture, row by row."""
    return np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1).reshape(-1, 2)
