r"""Noise that is stationary over the latent grid: a power spectrum, and the operator √Σ that it stands for.

    n = F⁻¹(√S ⊙ F ε),    S(f) ≥ 0 the power of the mode of frequency f = (fy, fx), in cycles a latent pixel

S = 1 is white noise; an offset of strength c is S(0) = 1 + c² N for N = h w pixels; the variance of a pixel is the mean
of S over all N modes. A spectrum is an array `[h, w // 2 + 1]`, the half that `rfft2` keeps: S(-f) = S(f).
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Spectrum = Float[np.ndarray, "h w2"]


def colour(
    white: Float[Array, "c h w"], root_spectrum: Float[Array, "#c h w2"] | Float[Array, "h w2"]
) -> Float[Array, "c h w"]:
    """`√Σ ε`: white noise with each mode multiplied by `√S`."""
    return jnp.fft.irfft2(jnp.fft.rfft2(white) * root_spectrum, s=white.shape[1:]).astype(white.dtype)


def frequencies(height: int, width: int) -> tuple[Float[np.ndarray, "h 1"], Float[np.ndarray, "1 w2"]]:
    """`fy` and `fx` of each mode, in cycles a latent pixel, 0 to 1/2 in absolute value."""
    return np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]


def multiplicity(height: int, width: int) -> Spectrum:
    """How many of the N modes each entry of a half spectrum stands for: 1 or 2; the sum is N."""
    fx = frequencies(height, width)[1]
    return np.broadcast_to(np.where((fx == 0) | (fx == 0.5), 1.0, 2.0), (height, width // 2 + 1))


def mean_power(spectrum: Float[np.ndarray, "*c h w2"], width: int) -> Float[np.ndarray, "*c"]:
    """The mean over all modes: the variance of a pixel."""
    weight = multiplicity(spectrum.shape[-2], width)
    return np.asarray((spectrum * weight).sum((-2, -1)) / weight.sum())


def pyramid_spectrum(height: int, width: int, discount: float, levels: int) -> Spectrum:
    r"""The expected spectrum of multi-resolution noise, scaled to a pixel variance of 1.

    Level i adds normal noise on a grid coarser by `a = r^i`, `r ~ U[2, 4)`, up-sampled linearly and times `discount^i`.
    A level of a random phase has, on each axis, the spectrum `Σ_m a sinc⁴(a (f + m))`; a level of a single pixel is a
    shift, and the last one. Level 0 is white, as is the noise that the levels are added to.

    Source: J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training", 2023; called `multires_noise_discount`
    and `multires_noise_iterations` by kohya's scripts, which divide by the measured deviation of a whole batch: that
    ties its examples to one another, and shrinks an offset along with the rest.
    """
    nodes, weights = np.polynomial.legendre.leggauss(24)
    spectrum = np.full((height, width // 2 + 1), 1.0 + (levels > 0))
    fy, fx = frequencies(height, width)
    reached = 1.0  # the probability that no level before this one had a single pixel
    for level in range(1, levels):
        for ratio, weight in zip(3.0 + nodes, weights / 2, strict=True):
            power = _upsampled(fy, height, ratio**level) * _upsampled(fx, width, ratio**level)
            spectrum += reached * weight * discount ** (2 * level) * power
        reached *= np.clip(((min(height, width) / 2) ** (1 / level) - 2) / 2, 0, 1)
    return spectrum / mean_power(spectrum, width)


def _upsampled(frequency: np.ndarray, size: int, factor: float) -> np.ndarray:
    if factor > size / 2:  # less than two pixels, which are rounded down to one
        return np.where(frequency == 0, float(size), 0.0)
    aliases = frequency[..., None] + np.arange(-8, 9)
    return factor * (np.sinc(factor * aliases) ** 4).sum(-1)


def formula_spectrum(formula: str, height: int, width: int) -> Spectrum:
    """The spectrum that a formula of the radial frequency gives, such as `"1 + 0.02 / (f + 0.01) ** 2"`.

    Args:
        formula: Python's arithmetic and comparisons over `f` (cycles a latent pixel, 0 to 0.707), `N` (latent pixels)
            and `pi`, with `exp log sqrt abs minimum maximum where` and `interp(f, (f0, …), (S0, …))`.

    Raises:
        ValueError: the formula is malformed, or its values are no powers.
    """
    fy, fx = frequencies(height, width)
    names = {"f": np.hypot(fy, fx), "N": float(height * width), "pi": np.pi}
    try:
        with np.errstate(all="ignore"):
            values = np.asarray(_evaluate(ast.parse(formula.strip(), mode="eval").body, names))
        if values.dtype.kind not in "fb" or values.ndim not in (0, 2):
            raise TypeError("its value is not a number for each frequency")
        values = values.astype(np.float64)
    except (SyntaxError, TypeError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"{formula[:80]!r} is no formula of f: {error or type(error).__name__}") from error
    values = np.broadcast_to(values, names["f"].shape).copy()
    if not np.isfinite(values).all() or values.min() < 0 or values.max() == 0:
        raise ValueError(
            f"{formula[:80]!r} has values from {values.min():g} to {values.max():g}; powers are finite and >= 0"
        )
    return values


_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: np.true_divide,
    ast.Pow: np.power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
}


def _interpolate(f: np.ndarray, places: list[float], values: list[float]) -> np.ndarray:
    if not np.all(np.diff(places) > 0):
        raise ValueError("the places of interp must rise")
    return np.interp(f, places, values)


# With the number of arguments: one more would be numpy's `out`.
_FUNCTIONS: Mapping[str, tuple[int, Callable[..., Any]]] = {
    "exp": (1, np.exp),
    "log": (1, np.log),
    "sqrt": (1, np.sqrt),
    "abs": (1, np.abs),
    "minimum": (2, np.minimum),
    "maximum": (2, np.maximum),
    "where": (3, np.where),
    "interp": (3, _interpolate),
}


def _evaluate(node: ast.AST, names: Mapping[str, Any]) -> Any:
    """A formula's value; anything but arithmetic is refused, for a formula may come from a stranger's config.json."""

    def value(child: ast.AST) -> Any:
        return _evaluate(child, names)

    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](value(left), value(right))
        case ast.UnaryOp(op, operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](value(operand))
        case ast.Compare(left, [op], [right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](value(left), value(right))
        case ast.Call(ast.Name(id=name), arguments, []) if len(arguments) == _FUNCTIONS.get(name, (-1,))[0]:
            return _FUNCTIONS[name][1](*map(value, arguments))
        case ast.Tuple(elements) | ast.List(elements):
            return [value(element) for element in elements]
    raise TypeError(f"{ast.unparse(node)} is not allowed in it")
