"""Matrix FLOPs of a function, from its jaxpr: those of its dots and convolutions, on any machine, for any platform.

A multiplication and an addition are two. What is elementwise is left out, as is usual for model FLOPs (Chowdhery et al.
2022, arXiv 2204.02311, appendix B). A loop's body counts as often as it runs where that is known, a `while`'s once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

Shapes = tuple[tuple[int, ...], ...]


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Matrix FLOPs of one call, over all devices together.

    Args:
        arguments: arrays, or abstract ones.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def jaxpr_flops(jaxpr: Any) -> int:
    """Matrix FLOPs of a jaxpr, of all devices that a `shard_map` in it runs on."""
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def kernel_flops(jaxpr: Any) -> dict[tuple[str, Shapes], int]:
    """Matrix FLOPs of one call of each Pallas kernel in a jaxpr, by its name and the shapes of its results."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            shapes = tuple(tuple(each.aval.shape) for each in equation.outvars)
            found[equation.params["name"] or "", shapes] = _equation_flops(equation)
        for inner in (each for value in equation.params.values() for each in _jaxprs(value)):
            found |= kernel_flops(inner)
    return found


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name == "pallas_call" and params.get("cost_estimate") is not None:
        return int(params["cost_estimate"].flops)
    inner = [jaxpr_flops(each) for value in params.values() for each in _jaxprs(value)]
    if name == "cond":
        return max(inner, default=0)
    return sum(inner) * _times(name, params)


def _times(name: str, params: dict[str, Any]) -> int:
    """How often what an equation holds is run."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [each for part in value for each in _jaxprs(part)] if isinstance(value, tuple | list) else []


def _convolution_flops(equation: Any) -> int:
    """Of the products with an element of the input, not its padding or the holes of a dilation."""
    left, right = (each.aval.shape for each in equation.invars)
    out, params = equation.outvars[0].aval.shape, equation.params
    numbers = params["dimension_numbers"]
    products = 1
    axes = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    for place, (inputs, window, outputs) in enumerate(axes):
        products *= window_products(
            left[inputs],
            out[outputs],
            size=right[window],
            stride=params["window_strides"][place],
            pad=params["padding"][place][0],
            input_dilation=params["lhs_dilation"][place],
            kernel_dilation=params["rhs_dilation"][place],
        )
    # The kernel's input features are those of one group.
    features = right[numbers.rhs_spec[1]] * right[numbers.rhs_spec[0]]
    return 2 * products * features * left[numbers.lhs_spec[0]] // params["batch_group_count"]


def window_products(
    inputs: int,
    outputs: int,
    *,
    size: int,
    stride: int = 1,
    pad: int = 0,
    input_dilation: int = 1,
    kernel_dilation: int = 1,
) -> int:
    """Along one axis of a convolution, the pairs of an output and a place in the window that fall on an input.

    Args:
        inputs: elements of the input, without the holes of its dilation.
        outputs: elements of the output.
        size: places in the window.
        pad: before the first input; it may be negative.
    """
    reach, count = (inputs - 1) * input_dilation, 0
    common = math.gcd(stride, input_dilation)
    period = input_dilation // common
    inverse = pow(stride // common, -1, period)
    for place in range(size):
        # Output o falls on o * stride + shift, which has to be in reach, and a multiple of the dilation.
        shift = place * kernel_dilation - pad
        first, last = max(0, -(shift // stride)), min(outputs - 1, (reach - shift) // stride)
        if first <= last and shift % common == 0:
            residue = -(shift // common) * inverse % period
            count += (last - residue) // period - (first - 1 - residue) // period
    return count
