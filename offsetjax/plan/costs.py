"""What a compiled program does: matrix FLOPs, bytes to and from HBM, and collectives, of every operation it executes.

All figures are one device's. A loop's operations count as often as it runs. Of a fusion the FLOPs are those of what it
holds; the bytes are in `traffic.py`. Operands that the compiler keeps on the chip cost nothing, and the copies that
bring them there are operations of their own.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from offsetjax.plan.hlo import Computation, Instruction, Module, Shape, bits, first_group, parse
from offsetjax.plan.traffic import hbm_bytes
from offsetjax.training.flops import Shapes, window_products

# A float32 product on matrix units of bfloat16, by its precision, as bfloat16 products.
_PASSES = {"high": 3, "highest": 6}
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "while", "call", "conditional", "send", "recv", "domain", "add-dependency"),
    *("async-start", "async-update", "async-done"),
)
_ALLOCATION = 'custom_call_target="AllocateBuffer"'  # memory that is given a name, and not touched
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
Kernels = Mapping[tuple[str, Shapes], int]
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


class Work(NamedTuple):
    """One operation that is executed `times` times; the other figures are of one time.

    Attributes:
        flops: of dots and convolutions.
        passes: how many bfloat16 products make one of them.
        hbm_bytes: read and written.
        cycles: the compiler's own estimate; None before code generation, and for operations that have none.
    """

    instruction: Instruction
    times: int
    flops: int
    passes: int
    hbm_bytes: int
    cycles: int | None


class Collective(NamedTuple):
    """One exchange between devices, `times` times.

    Attributes:
        kind: such as `all-gather`.
        num_bytes: the larger of what a device gives and what it gets: gathered, reduced or sent.
        group: the devices of the first group, by their place in the mesh; empty over DCN.
        is_dcn: whether it leaves the slice.
    """

    kind: str
    times: int
    num_bytes: int
    group: tuple[int, ...]
    is_dcn: bool


def read_program(text: str, kernels: Kernels | None = None) -> tuple[list[Work], list[Collective]]:
    """What a compiled program's text says that it computes and exchanges.

    Args:
        kernels: as for `works`.

    Raises:
        ValueError: the text is not whole, or is not as this compiler's.
    """
    try:
        module = parse(text)
        return list(works(module, kernels)), list(collectives(module))
    except (LookupError, TypeError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"the text of the HLO module is of another form ({type(error).__name__}: {error})") from error


def executed(module: Module) -> Iterator[tuple[Computation, Instruction, int]]:
    """Every instruction that runs, with its computation and how often; what is inside fusions is not kept apart."""
    yield from _executed(module, module.entry, 1)


def _executed(module: Module, computation: Computation, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
    for each in computation.instructions:
        yield computation, each, times
        if each.opcode == "while":
            trips = trip_count(module, computation, each)
            yield from _executed(module, module.computations[each.called("body") or ""], times * trips)
        elif each.opcode in ("call", "async-start"):
            name = each.called("to_apply") or each.called("calls") or each.called("called_computation") or ""
            yield from _executed(module, module.computations[name], times)
        elif each.opcode == "conditional":  # as if all branches ran: which does is not known
            for name in _branches(each):
                yield from _executed(module, module.computations[name], times)


def _branches(conditional: Instruction) -> list[str]:
    if several := re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes):
        return re.findall(r"%?([\w.\-]+)", several[1])
    return [name for key in ("true_computation", "false_computation") if (name := conditional.called(key))]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int:
    """How often a loop's body runs: as the compiler says, or from a condition `counter < bound`; 1 if neither says."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.called("condition") or ""]
    compare = condition.root
    sides = [_behind(condition, name) for name in compare.operands]
    if compare.opcode == "fusion":
        inner, arguments = module.computations[compare.called("calls") or ""], sides
        compare = inner.root
        sides = [_behind(inner, name) for name in compare.operands]
        sides = [arguments[int(each.literal)] if each.opcode == "parameter" else each for each in sides]
    # What the loop carries is, at first, what it is given: the counter its start, a bound itself.
    given = computation.by_name[loop.operands[0]].operands
    numbers = []
    for each in sides:
        index = re.search(r"index=(\d+)", each.attributes) if each.opcode == "get-tuple-element" else None
        start = _behind(computation, given[int(index[1])]) if index and given else each
        numbers.append(int(start.literal) if re.fullmatch(r"-?\d+", start.literal) else None)
    if compare.opcode != "compare" or len(numbers) != 2 or None in numbers:
        return 1
    direction = re.search(r"direction=(\w+)", compare.attributes)
    low, high = numbers if direction and direction[1] in ("LT", "LE") else reversed(numbers)
    return max(1, high - low + bool(direction and direction[1] in ("LE", "GE")))  # type: ignore[operator]


def _behind(computation: Computation, name: str) -> Instruction:
    """The instruction whose value this is, behind copies."""
    each = computation.by_name[name]
    for _ in computation.instructions:  # a broken text could go in a circle
        if each.opcode not in ("copy", "bitcast", "convert") or not each.operands:
            break
        each = computation.by_name[each.operands[0]]
    return each


def works(module: Module, kernels: Kernels | None = None) -> Iterator[Work]:
    """What each executed operation costs; operations that cost nothing are left out.

    Args:
        kernels: FLOPs of the Pallas kernels, of which the program does not say what they do (`flops.kernel_flops`).
    """
    for computation, each, times in executed(module):
        if each.opcode in _FREE or each.opcode.endswith("-done") or _ALLOCATION in each.attributes:
            continue
        flops, passes = _flops(module, computation, each, kernels or {})
        cycles = re.search(r'"estimated_cycles":"(\d+)"', each.attributes)
        moved = hbm_bytes(module, computation, each)
        if flops or moved or cycles:
            yield Work(each, times, flops, passes, moved, int(cycles[1]) if cycles else None)


def _flops(module: Module, computation: Computation, each: Instruction, kernels: Kernels) -> tuple[int, int]:
    """FLOPs of dots and convolutions, those within a fusion included, and the passes of the largest of them."""
    if each.opcode == "dot":
        return _dot_flops(computation, each), _passes(each)
    if each.opcode == "convolution":
        return _convolution_flops(computation, each), _passes(each)
    if each.opcode == "custom-call":
        return _kernel_flops(each, kernels), 1
    if each.opcode != "fusion":
        return 0, 1
    inner = module.computations[each.called("calls") or ""]
    parts = [_flops(module, inner, part, kernels) for part in inner.instructions if part.opcode in _WITH_FLOPS]
    return sum(flops for flops, _ in parts), max(parts, default=(0, 1))[1]


def _kernel_flops(each: Instruction, kernels: Kernels) -> int:
    """What the kernel's author has said, or what was counted."""
    if estimate := re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', each.attributes):
        return int(estimate[1])
    names = re.search(r'op_name="([^"]*)"', each.attributes)
    shapes = tuple(shape.dimensions for shape in each.shapes)
    path = names[1].split("/") if names else []
    return next((flops for (name, of), flops in kernels.items() if name in path and of == shapes), 0)


_WITH_FLOPS = ("dot", "convolution", "fusion", "custom-call")


def _passes(each: Instruction) -> int:
    found = re.search(r"operand_precision=\{(\w+)", each.attributes)
    return _PASSES.get(found[1], 1) if found else 1


def _dot_flops(computation: Computation, dot: Instruction) -> int:
    left = computation.by_name[dot.operands[0]].shapes[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2 * dot.shapes[0].size * math.prod(left.dimensions[axis] for axis in axes)


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """Of the products with an element of the input, not its padding or the holes of a dilation."""
    left, right = (computation.by_name[name].shapes[0] for name in convolution.operands[:2])
    out = convolution.shapes[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if not labels:
        return 0
    in_place, kernel_place, out_place = labels[1].index, labels[2].index, labels[3].index
    spatial = [label for label in labels[3] if label.isdigit()]
    window = _window(convolution.attributes, len(spatial))
    products = 1
    for axis, label in zip(window, spatial, strict=True):
        products *= window_products(left.dimensions[in_place(label)], out.dimensions[out_place(label)], **axis)
    features = right.dimensions[kernel_place("i")] * out.dimensions[out_place("f")]
    batch = left.dimensions[in_place("b")]
    groups = re.search(r"batch_group_count=(\d+)", convolution.attributes)
    return 2 * products * features * batch // (int(groups[1]) if groups else 1)


def _window(attributes: str, axes: int) -> list[dict[str, int]]:
    """The window of each spatial axis, in the words of `flops.window_products`."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}
    names = {"size": "size", "stride": "stride", "lhs_dilate": "input_dilation", "rhs_dilate": "kernel_dilation"}
    windows = [dict.fromkeys(names.values(), 1) | {"pad": 0} for _ in range(axes)]
    for key, name in (*names.items(), ("pad", "pad")):
        for window, value in zip(windows, fields.get(key, "").split("x") if key in fields else (), strict=False):
            window[name] = int(value.split("_")[0])
    return windows


def collectives(module: Module) -> Iterator[Collective]:
    """Every exchange between devices; one that is spread over several fusions, to hide it, counts where it starts."""
    for computation, each, times in executed(module):
        if each.opcode == "fusion":
            inner = module.computations[each.called("calls") or ""]
            starts = any("AsyncCollectiveStart" in part.attributes for part in inner.instructions)
            is_scatter = inner.name.startswith("all-reduce-scatter")
            for part in inner.instructions:
                if part.opcode.removesuffix("-start") not in _COLLECTIVES:
                    continue
                if "async_collective_fusion_config" in part.attributes and not starts:
                    continue
                yield _collective(inner, part, times, "reduce-scatter" if is_scatter else "")
        elif each.opcode.removesuffix("-start") in _COLLECTIVES:
            yield _collective(computation, each, times)
        elif each.opcode == "send" and (kind := _MEGASCALE.search(each.attributes)):
            moved = _plain_bytes(computation.by_name[each.operands[0]].shapes)
            yield Collective(kind[1].lower().replace("_", "-"), times, moved, (), True)


def _collective(computation: Computation, each: Instruction, times: int, kind: str = "") -> Collective:
    given = _plain_bytes(tuple(shape for name in each.operands for shape in computation.by_name[name].shapes))
    kind = kind or each.opcode.removesuffix("-start")
    group = first_group(each.attributes)
    num_bytes = given * max(1, len(group)) if kind == "all-gather" else given
    return Collective(kind, times, num_bytes, group, False)


def _plain_bytes(shapes: tuple[Shape, ...]) -> int:
    """Without padding."""
    return sum(shape.size * bits(shape.dtype) // 8 for shape in shapes)
