"""What an operation of a compiled program reads from HBM and writes to it, in bytes, padded as it lies there.

A fusion computes no more of what it holds than its results need, and each of its operands is charged for as many
elements as that takes. The need is followed from the results to the operands:

    slice, dynamic-slice, gather     as many elements of the operand as the result has
    dynamic-update-slice, scatter    of a buffer that the fusion updates in place: the update is written, the rest stays
                                     untouched; of anything else, the whole result
    elementwise, bitcast, transpose  as many as are needed of the result
    reduce                           of the operand the share that is needed of the result
    tuple, get-tuple-element         what is needed of the element
    fusion                           a nested one, by its own results
    all others                       the whole operand

A layer's weights in the stacked weights of a loop are thereby one layer's, however deep the slice is nested. What
several users need of one value adds up, to no more than the whole.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from offsetjax.plan.hlo import Computation, Instruction, Module, Shape, bits

SLICING = ("slice", "dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # with the place of the update among the operands
_WHOLE = (
    "dot",
    "convolution",
    "custom-call",
    "sort",
    "iota",
    "rng-bit-generator",
    "cholesky",
    "triangular-solve",
    "fft",
)
_SAME = ("bitcast", "copy", "reshape", "opt-barrier")  # the operand itself, under another shape
_ELEMENT = re.compile(r"index=(\d+)")

Needs = Mapping[int, float]  # elements of each array of a result, by its place in the flattened tuple


def hbm_bytes(module: Module, computation: Computation, each: Instruction) -> int:
    """Bytes that an instruction moves to and from HBM when it runs once; on-chip memory costs nothing."""
    operands = [computation.by_name[name].shapes for name in each.operands if name in computation.by_name]
    opcode = each.opcode.removesuffix("-start")
    if opcode != each.opcode:
        return _started(opcode, each, operands)
    if opcode in SLICING:
        return _moved(each.shapes[0], operands[0][0], each.shapes[0])
    if opcode in _UPDATES:
        update = operands[_UPDATES[opcode]][0]
        return _moved(update, update, each.shapes[0])
    if opcode != "fusion":
        return in_hbm(each.shapes) + sum(map(in_hbm, operands))
    inner = module.computations[each.called("calls") or ""]
    needed = needed_of_parameters(module, inner)
    read = sum(_bytes(shapes, needed.get(place, {})) for place, shapes in enumerate(operands))
    return read + sum(map(_in_hbm, written(module, inner, inner.root)))


def _started(opcode: str, each: Instruction, operands: Sequence[tuple[Shape, ...]]) -> int:
    """Of an operation that runs beside others: its result holds its operands, what it makes, and what is its own."""
    given = sum(map(len, operands))
    if opcode == "copy":  # what it makes stands first
        return in_hbm(each.shapes[:2])
    if opcode in SLICING:
        return _moved(each.shapes[given], operands[0][0], each.shapes[given])
    if opcode in _UPDATES:
        update = operands[_UPDATES[opcode]][0]
        return _moved(update, update, each.shapes[given])
    return sum(map(in_hbm, operands))


def _moved(part: Shape, source: Shape, target: Shape) -> int:
    """The bytes of a part that is read from one array and written to another, of which either may be on the chip."""
    return part.num_bytes * ((source.space == 0) + (target.space == 0))


def in_hbm(shapes: Sequence[Shape]) -> int:
    """The bytes of those arrays that lie in HBM."""
    return sum(map(_in_hbm, shapes))


def _in_hbm(shape: Shape) -> int:
    return shape.num_bytes if shape.space == 0 else 0


def _bytes(shapes: Sequence[Shape], needs: Needs) -> int:
    """What is read of an operand of which so many elements are needed."""
    return sum(
        min(shape.num_bytes, round(needs.get(place, 0.0) * bits(shape.dtype) / 8))
        for place, shape in enumerate(shapes)
        if shape.space == 0
    )


def _elements(shape: Shape) -> float:
    """The elements of an array, those that pad it included: what reading it all reads."""
    return shape.num_bytes * 8 / bits(shape.dtype) if bits(shape.dtype) else 0.0


def _all(shapes: Sequence[Shape]) -> dict[int, float]:
    return {place: _elements(shape) for place, shape in enumerate(shapes)}


def needed_of_parameters(
    module: Module, inner: Computation, of_root: Needs | None = None, updates_in_place: bool = True
) -> dict[int, Needs]:
    """How many elements of each parameter a fusion needs, by the parameter's number.

    Args:
        of_root: what is needed of its results; None: all.
        updates_in_place: whether its result may be the buffer that it is given, changed.
    """
    needs: dict[str, dict[int, float]] = defaultdict(dict)
    needs[inner.root.name] = dict(_all(inner.root.shapes) if of_root is None else of_root)
    in_place = _updated_in_place(module, inner) if updates_in_place else frozenset()
    for each in reversed(inner.instructions):  # operands stand before their users
        if not needs[each.name] or not any(needs[each.name].values()):
            continue
        for name, more in _needed_by(module, inner, each, needs[each.name], each.name in in_place):
            whole = _all(inner.by_name[name].shapes)
            for place, count in more.items():
                needs[name][place] = min(whole.get(place, 0.0), needs[name].get(place, 0.0) + count)
    return {place: needs[parameter.name] for place, parameter in inner.parameters.items()}


def _needed_by(
    module: Module, inner: Computation, each: Instruction, needs: Needs, is_in_place: bool
) -> list[tuple[str, Needs]]:
    """What an instruction needs of its operands for so many elements of its results."""
    operands = [(name, inner.by_name[name].shapes) for name in each.operands if name in inner.by_name]
    if each.opcode == "tuple":
        offsets: list[tuple[str, Needs]] = []
        place = 0
        for name, shapes in operands:
            offsets.append((name, {i: needs.get(place + i, 0.0) for i in range(len(shapes))}))
            place += len(shapes)
        return offsets
    if each.opcode == "get-tuple-element":
        index = _ELEMENT.search(each.attributes)  # the tuples inside of fusions are flat
        return [(operands[0][0], {int(index[1]) if index else 0: needs.get(0, 0.0)})]
    if each.opcode == "fusion":
        nested = module.computations[each.called("calls") or ""]
        parameters = needed_of_parameters(module, nested, needs, updates_in_place=is_in_place)
        return [(name, parameters.get(place, {})) for place, (name, _) in enumerate(operands)]
    count = max(needs.values())
    if each.opcode in SLICING:
        return [(operands[0][0], {0: count}), *((name, _all(shapes)) for name, shapes in operands[1:])]
    if each.opcode in _UPDATES:
        buffer, *others = operands
        return [(buffer[0], {} if is_in_place else {0: count}), *((name, _all(shapes)) for name, shapes in others)]
    if each.opcode in _WHOLE or len(each.shapes) != 1:
        return [(name, _all(shapes)) for name, shapes in operands]
    if each.opcode in ("reduce", "reduce-window"):
        share = min(1.0, count / max(1.0, _elements(each.shapes[0])))
        return [(name, {i: share * all_ for i, all_ in _all(shapes).items()}) for name, shapes in operands]
    share = min(1.0, count / max(1.0, _elements(each.shapes[0])))

    def of_operand(shape: Shape) -> float:
        # One of the result's size may be padded in another way.
        return _elements(shape) * share if shape.size == each.shapes[0].size else min(_elements(shape), count)

    return [(name, {place: of_operand(shape) for place, shape in enumerate(shapes)}) for name, shapes in operands]


def written(module: Module, inner: Computation, root: Instruction) -> list[Shape]:
    """What a fusion writes: its results, or of those that it updates in place the updates."""
    if root.opcode == "tuple":
        return [shape for name in root.operands for shape in written(module, inner, inner.by_name[name])]
    if root.opcode == "parameter":  # passed on
        return []
    if update := _update_of(module, inner, root):
        return [shape for shape in update if all(result.space == 0 for result in root.shapes)]
    return list(root.shapes)


def _update_of(module: Module, inner: Computation, value: Instruction) -> tuple[Shape, ...] | None:
    """The update's arrays, where a value is one of the fusion's parameters with a part of it replaced."""
    value = _behind(inner, value)
    if value.opcode in _UPDATES:
        if _behind(inner, inner.by_name[value.operands[0]]).opcode != "parameter":
            return None
        return inner.by_name[value.operands[_UPDATES[value.opcode]]].shapes
    if value.opcode == "fusion" and len(value.shapes) == 1:
        nested = module.computations[value.called("calls") or ""]
        buffer = _buffer(module, nested, nested.root)
        if buffer is None or _behind(inner, inner.by_name[value.operands[buffer]]).opcode != "parameter":
            return None
        return _update_of(module, nested, nested.root)
    return None


def _buffer(module: Module, inner: Computation, value: Instruction) -> int | None:
    """The number of the parameter that a value is, but for a part that is replaced; None where it is none."""
    value = _behind(inner, value)
    if value.opcode in _UPDATES:
        value = _behind(inner, inner.by_name[value.operands[0]])
    elif value.opcode == "fusion" and len(value.shapes) == 1:
        nested = module.computations[value.called("calls") or ""]
        place = _buffer(module, nested, nested.root)
        if place is None:
            return None
        value = _behind(inner, inner.by_name[value.operands[place]])
    return int(value.literal) if value.opcode == "parameter" else None


def _updated_in_place(module: Module, inner: Computation) -> frozenset[str]:
    """The instructions that replace a part of a parameter for a result of the fusion."""
    results = [inner.root]
    if inner.root.opcode == "tuple":
        results = [inner.by_name[name] for name in inner.root.operands]
    found = [_behind(inner, each) for each in results if _update_of(module, inner, each) is not None]
    return frozenset(each.name for each in found)


def _behind(inner: Computation, value: Instruction) -> Instruction:
    while value.opcode in _SAME and value.operands and value.operands[0] in inner.by_name:
        value = inner.by_name[value.operands[0]]
    return value
