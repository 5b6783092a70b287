"""Reads the text of an optimised HLO module: computations, instructions, shapes in memory, groups of devices.

The form is XLA's own (HloModule::ToString). Of an instruction what planning asks for is read, and the rest is kept as
text in `attributes`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0, "s2": 2, "u2": 2, "s4": 4, "u4": 4}
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_END = re.compile(r"\}(, execution_thread=.*)?")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Shape:
    """One array: its element type, its dimensions, and how they lie in memory.

    Attributes:
        minor_to_major: the dimensions from the fastest to the slowest.
        tile: the first tile, which pads the fastest dimensions; empty where there is none.
        space: the memory: 0 is HBM (on a CPU, the machine's memory), others are the chip's own.
    """

    dtype: str
    dimensions: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dimensions)

    @cached_property
    def num_bytes(self) -> int:
        """What it takes in memory, padded to whole tiles."""
        sizes = [self.dimensions[axis] for axis in reversed(self.minor_to_major)] or list(self.dimensions)
        for place, tile in enumerate(reversed(self.tile[: len(sizes)]), 1):
            sizes[-place] = -(-sizes[-place] // tile) * tile
        return math.prod(sizes) * bits(self.dtype) // 8


def bits(dtype: str) -> int:
    """Bits an element: `bf16` has 16."""
    if dtype in _BITS:
        return _BITS[dtype]
    return int(width[0]) if (width := re.search(r"\d+", dtype)) else 0


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a shape, those of a tuple one after another."""
    return tuple(_shape(*match.groups()) for match in _SHAPE.finditer(text))


def _shape(dtype: str, dimensions: str, layout: str | None) -> Shape:
    order, _, rest = (layout or "").partition(":")
    tile = re.search(r"T\(([\d,]+)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Shape(
        dtype,
        _numbers(dimensions.replace("<=", "")),
        _numbers(order),
        _numbers(tile[1]) if tile else (),
        int(space[1]) if space else 0,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(",") if each.strip())


@dataclass(frozen=True)
class Instruction:
    """One instruction; `literal` is a scalar constant's value, or a parameter's number."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    def called(self, key: str) -> str | None:
        """The name of the computation that an attribute names, such as `body`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {each.name: each for each in self.instructions}

    @cached_property
    def users(self) -> Mapping[str, Sequence[Instruction]]:
        """Who takes an instruction's result."""
        users: dict[str, list[Instruction]] = {}
        for each in self.instructions:
            for operand in dict.fromkeys(each.operands):
                users.setdefault(operand, []).append(each)
        return users

    @property
    def root(self) -> Instruction:
        return next((each for each in self.instructions if each.is_root), self.instructions[-1])

    @cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        return {int(each.literal): each for each in self.instructions if each.opcode == "parameter"}


@dataclass(frozen=True)
class Module:
    """Computations by name, and the one in which execution begins."""

    entry: Computation
    computations: Mapping[str, Computation]


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
        ValueError: the text has no entry computation, or a computation that does not end: it is not whole.
    """
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if name and _END.fullmatch(line):
            computations[name] = Computation(name, tuple(instructions))
            name = ""
        elif name:
            if instruction := _instruction(line):
                instructions.append(instruction)
            elif instructions:  # a kernel's own metadata is written over several lines
                last = instructions[-1]
                instructions[-1] = dataclasses.replace(last, attributes=f"{last.attributes}\n{line}")
        elif head := _HEAD.match(line):
            name, instructions = head[1], []
            entry = name if line.startswith("ENTRY") else entry
    if name or entry not in computations:
        raise ValueError("the text of the HLO module is not whole")
    return Module(computations[entry], computations)


def _instruction(line: str) -> Instruction | None:
    head = _LINE.match(line)
    if not head:
        return None
    begin = head.end()
    end = _closing(line, begin) if line[begin] == "(" else line.find(" ", begin)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close - 1]
    is_leaf = opcode[1] in ("constant", "parameter")
    return Instruction(
        name=head[2],
        opcode=opcode[1],
        shapes=parse_shapes(line[begin:end]),
        operands=() if is_leaf else tuple(_NAME.findall(inside)),
        literal=inside[:32] if is_leaf else "",
        attributes=line[close:],
        is_root=bool(head[1]),
    )


def _closing(line: str, begin: int) -> int:
    """The place after the bracket that closes the one at `begin`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, begin):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(line)


def first_group(attributes: str) -> tuple[int, ...]:
    """The devices of the first group that exchanges data in a collective; empty where no group is given.

    The groups are written out, `{{0,1},{2,3}}`; as a range that is reshaped, perhaps transposed, and cut into rows,
    `[4,2]<=[2,4]T(1,0)`; or as axes of a mesh, `mesh['a'=2,'b'=4] {'b'}`. Of a permutation it is the first pair that
    moves anything.
    """
    if written := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return _numbers(written[1])
    if ranged := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        devices = np.arange(math.prod(_numbers(ranged[2]))).reshape(_numbers(ranged[2]))
        if ranged[3]:
            devices = devices.transpose(_numbers(ranged[3]))
        return tuple(devices.reshape(_numbers(ranged[1])[0], -1)[0].tolist())
    if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        return _group_of_mesh(meshed[1], meshed[2])
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", attributes):
        moved = [(source, target) for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if source != target]
        return (int(moved[0][0]), int(moved[0][1])) if moved else ()
    return ()


def _group_of_mesh(axes: str, over: str) -> tuple[int, ...]:
    """The devices along some axes from device 0; `'a':(2)4` is the part of 4 of the axis `a` that is left after 2."""
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    strides = {axis: math.prod(list(sizes.values())[place + 1 :]) for place, axis in enumerate(sizes)}
    group = np.zeros(1, int)
    for axis, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        count = int(part) if part else sizes[axis]
        stride = strides[axis] * sizes[axis] // (int(before or 1) * count)
        group = (group[:, None] + stride * np.arange(count)).ravel()
    return tuple(group.tolist())
