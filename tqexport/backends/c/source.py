"""The integer model as C: one file that holds the network, its codes, and the functions that run it.

Values are int8 levels, channels last, as in TFLite Micro, and are rounded as TFLite Micro rounds: the same bytes come
out. Everything that depends on the width stands in tables with a row for each width of the file; the codes stand there
once, and are shifted as they are read. A file of one width of 1, 2 or 4 bits holds them packed instead.

The functions are C files themselves (``kernels/``), of which a network gets those that it needs.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.backends.c.arena import Block, blocks_of, buffers_of, is_reordered, place
from tqexport.backends.c.reading import FACTS, FORMAT, MAGIC
from tqexport.backends.c.text import COLUMNS, array, comment_words, identifier, prefix_of
from tqexport.backends.packing import PACKED_WIDTHS, packed
from tqexport.errors import ConversionError
from tqexport.facts import Facts, encode
from tqexport.integer.alike import alike
from tqexport.integer.arithmetic import FixedPoint, layer_factor, mean_factor, sum_factors
from tqexport.integer.grids import OFFSET, Grid
from tqexport.integer.model import (
    Add,
    Average,
    Concat,
    Convolution,
    IntegerModel,
    Maximum,
    Operation,
    Requantize,
    Reshape,
    Window,
)
from tqexport.integer.naming import INPUT
from tqexport.integer.weights import multiplier_at
from tqexport.truncation import STORED_BITS, max_code

__all__ = ["BAD_WIDTH", "Program", "render_c"]

BAD_WIDTH = -1

_NO_WEIGHTS = 64  # as in kernels/convolution.c
_MOST_EXPONENT = 14  # a sum of 16 bits is shifted that far at most, see kernels/scaling.c
_KERNELS = (  # the functions in the order in which they stand in a file, and what each needs
    ("types", ()),
    ("scaling", ()),
    ("weights", ()),
    ("codes", ()),
    ("packed_codes", ()),
    ("convolution", ("scaling", "weights")),
    ("addition", ("scaling",)),
    ("factor", ()),
    ("average", ("scaling", "factor")),
    ("move", ("scaling", "factor")),
    ("maximum", ()),
    ("join", ()),
    ("reshape", ()),
)
_NO_SPACE = Window((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))


@dataclass(frozen=True)
class Program:
    """A network as C.

    Attributes:
        source: The text of ``NAME.c``.
        table_bytes: Of its constants, codes included.
        arena_bytes: Of the memory that it needs while it runs.
    """

    source: str
    table_bytes: int
    arena_bytes: int


def render_c(networks: Sequence[IntegerModel], stem: str, facts: Facts) -> Program:
    """The C file of a network at one width or several.

    Args:
        networks: Its integer models, widths ascending.
        stem: The name of the file without ``.c``.
        facts: What the file says of itself.

    Raises:
        InputError: The widths differ in more than numbers.
        ConversionError: A layer's sums may exceed 32 bits.
    """
    same = alike(networks)
    writer = _Writer(same, stem)
    for number in range(len(same[0].operations)):
        writer.add(number)
    return writer.finish(facts)


class _Writer:
    def __init__(self, networks: Sequence[IntegerModel], stem: str) -> None:
        self._networks, self._stem = networks, stem
        self._network = networks[0]
        alone = networks[0].bits if len(networks) == 1 else STORED_BITS
        self._packed_bits = alone if alone in PACKED_WIDTHS else None
        self._names: set[str] = set()  # identifiers that are taken
        self._grids: dict[bytes, str] = {}  # identifiers by content
        self._kernels = {"types"}
        self._tables: list[str] = []
        self._calls: list[str] = []
        self._weights: dict[str, list[object]] = {}
        self._macs = self._table_bytes = 0

        buffers = buffers_of(self._network)
        self._outside = {INPUT: "input", buffers[self._network.output]: "output"}
        if buffers[self._network.output] == INPUT:
            raise ConversionError("the network returns its input as it is; there is nothing to write in C")
        self._windows = {f"{op.output}/window": op for op in self._network.operations if isinstance(op, Convolution)}
        blocks = blocks_of(self._network, buffers, self._outside)
        numbers = {operation.output: number for number, operation in enumerate(self._network.operations)}
        for name, layer in self._windows.items():
            blocks[name] = Block(2 * _window_size(layer), numbers[layer.output], numbers[layer.output])
        offsets, self._arena = place(blocks)
        self._places = {
            value: self._outside.get(buffer) or f"&bytes[{offsets[buffer]}]" for value, buffer in buffers.items()
        }
        self._window_places = {name: f"&arena[{offsets[name] // 2}]" for name in self._windows}

    def add(self, number: int) -> None:
        """Write one operation, with its numbers at every width."""
        operations = [network.operations[number] for network in self._networks]
        operation = operations[0]
        shapes = [self._network.shapes[name] for name in (*operation.inputs, operation.output)]
        *inputs, output = (str((*space, channels)).replace(",)", ")") for channels, *space in shapes)
        kind = f"{type(operation).__name__.lower()}, {' and '.join(inputs)} -> {output}"
        self._calls.append(f"    /* {comment_words(operation.name)}: {kind} */")
        match operation:
            case Convolution():
                self._convolution([layer for layer in operations if isinstance(layer, Convolution)])
            case Add():
                self._addition(operations)
            case Average():
                self._average(operations)
            case Concat():
                self._concat(operation)
            case Maximum():
                self._maximum(operation)
            case Requantize():
                self._move(operations)
            case Reshape():
                self._reshape(operation)
            case _:
                raise ConversionError(f"{operation.name} has no form in C")

    def finish(self, facts: Facts) -> Program:
        """The file."""
        prefix = prefix_of(self._stem)
        bits = [network.bits for network in self._networks]
        ends = {"input": self._network.shapes[INPUT], "output": self._network.shapes[self._network.output]}
        shapes = {name: [*space, channels] for name, (channels, *space) in ends.items()}
        record = {"format": FORMAT, **encode(facts), "shapes": shapes, "weights": self._weights}
        # In JSON "\/" is a slash too, and then nothing in it ends or begins a comment.
        described = json.dumps(record, sort_keys=True).replace("/", "\\/")
        rows = [
            np.array([b, row, 0 if len(bits) == 1 else STORED_BITS - b, max_code(b), multiplier_at(b)], np.uint8)
            for row, b in enumerate(bits)
        ]
        self._count(*rows)
        needed = {*self._kernels} | {part for name, parts in _KERNELS if name in self._kernels for part in parts}
        kernels = [_kernel(name) for name, _ in _KERNELS if name in needed]
        if self._packed_bits:
            macros = f"#define BITS {self._packed_bits}\n#define CODES_PER_BYTE {8 // self._packed_bits}\n"
            kernels.insert(0, macros)
        widths = ", ".join(map(str, bits))
        head = [
            f"{MAGIC} Do not edit it: export it again.",
            " *",
            f" * {comment_words(self._stem)}.c runs at {widths} bits; each run multiplies {self._macs:,} times.",
            f" * It has {self._table_bytes:,} bytes of constants and takes {self._arena:,} bytes of memory as it runs.",
            " * It computes and rounds as TFLite Micro does, to the last bit: levels are int8, channels last.",
            f" * How to call it stands in {comment_words(self._stem)}.h.",
            " *",
            f" * {FACTS}{described}",
            " */",
        ]
        arena = (
            "/* The memory of all values inside; two bytes in each element, for the windows. */\n"
            f"static int16_t arena[{prefix.upper()}_ARENA_BYTES / 2];\n"
        )
        parts = [
            "\n".join(head),
            f'#include "{self._stem}.h"\n\n#include <stddef.h>\n',
            *kernels,
            "/* The network's numbers. */\n",
            f"static const width widths[] = {{\n{_structs(rows)}\n}};\n",
            *self._tables,
            *([arena] if self._arena else []),
            self._run(prefix),
        ]
        return Program("\n".join(parts), self._table_bytes, self._arena)

    def _run(self, prefix: str) -> str:
        """The function that runs the network."""
        uses_row = any("[row]" in call for call in self._calls)
        uses_bytes = any("&bytes[" in call for call in self._calls)
        lines = [
            f"int {prefix}_run(const int8_t *input, int8_t *output, unsigned bits)",
            "{",
            *(["    int8_t *const bytes = (int8_t *)arena;"] if uses_bytes else []),
            "    const width *at = widths;",
            *(["    unsigned row;"] if uses_row else []),
            "    while (at->bits != bits) {",
            "        if (++at == widths + sizeof widths / sizeof widths[0]) {",
            f"            return {prefix.upper()}_BAD_WIDTH;",
            "        }",
            "    }",
            *(["    row = at->row;"] if uses_row else []),
            *self._calls,
            "    return 0;",
            "}",
            "",
        ]
        return "\n".join(lines)

    def _convolution(self, layers: Sequence[Convolution]) -> None:
        layer, networks = layers[0], self._networks
        for network, at_width in zip(networks, layers, strict=True):
            _check_sums(network, at_width)
        self._kernels.add("convolution")
        self._kernels.add("packed_codes" if self._packed_bits else "codes")
        own = self._name(layer)
        lines = [f"/* {comment_words(layer.name)} */"]
        if layer.codes is not None:
            codes = channels_last_rows(layer.codes.codes)
            if len(networks) == 1:
                codes = codes >> np.uint8(layer.codes.shift)
            if self._packed_bits:
                codes = packed(codes, self._packed_bits)
            lines.append(self._array(f"codes_{own}", codes))
            self._weights[f"{layer.name}.weight"] = [
                f"codes_{own}",
                [*layer.unsigned.shape],
                self._packed_bits or STORED_BITS,
            ]
        else:
            lines.append(self._array(f"weights_{own}", channels_last_rows(layer.unsigned).astype(np.int8)))
        factors = [
            layer_factor(network.grids[at_width.inputs[0]].scale, at_width.scale, network.grids[at_width.output])
            for network, at_width in zip(networks, layers, strict=True)
        ]
        for factor in factors:
            _check_factor(layer.name, factor)
        biases, multipliers, exponents = (
            np.stack(rows)
            for rows in (
                [at_width.bias for at_width in layers],
                [f.multiplier * np.where(at.signs < 0, -1, 1) for f, at in zip(factors, layers, strict=True)],
                [f.exponent - np.where(at.signs == 0, _NO_WEIGHTS, 0) for f, at in zip(factors, layers, strict=True)],
            )
        )
        lines.append(self._array(f"biases_{own}", biases.astype(np.int32)))
        lines.append(self._array(f"multipliers_{own}", multipliers.astype(np.int32)))
        lines.append(self._array(f"exponents_{own}", exponents.astype(np.int8)))
        source, target = (self._network.shapes[name] for name in (layer.inputs[0], layer.output))
        window = (layer.window or _NO_SPACE).planar
        (rows, columns), (output_rows, output_columns) = _space(source), _space(target)
        numbers = [rows, columns, source[0], output_rows, output_columns, target[0]]
        numbers += _window_numbers(layer.name, window, layer.groups)
        pointers = [f"codes_{own}, NULL"] if layer.codes is not None else [f"NULL, weights_{own}"]
        pointers += [f"biases_{own}", f"multipliers_{own}", f"exponents_{own}"]
        lines.append(
            f"static const convolution convolution_{own} = {{\n    {', '.join(map(str, numbers))},\n"
            f"    {', '.join(pointers)}\n}};\n"
        )
        self._table_bytes += 6 * 4 + 9 * 2 + 2 + 5 * 4
        self._macs += layer.unsigned[0].size * prod(target)
        self._tables.append("\n".join(lines))
        window_place = self._window_places[f"{layer.output}/window"]
        self._call("convolve", f"&convolution_{own}", *self._ends(layer), window_place, *self._grids_of(layer), "at")

    def _addition(self, sums: Sequence[Operation]) -> None:
        rows = []
        for network, at_width in zip(self._networks, sums, strict=True):
            first, second, target = (network.grids[name] for name in (*at_width.inputs, at_width.output))
            factors = sum_factors(first, second, target)
            for factor in factors:
                _check_factor(at_width.name, factor)
            rows.append([*(int(f.multiplier) for f in factors), *(int(f.exponent) for f in factors)])
        self._kernels.add("addition")
        factors_name = self._rows("addition", sums[0], rows, 16)
        count = prod(self._network.shapes[sums[0].output])
        self._call("add", factors_name, *self._ends(sums[0]), count, *self._grids_of(sums[0]))

    def _average(self, means: Sequence[Operation]) -> None:
        source = self._network.shapes[means[0].inputs[0]]
        places = prod(source[1:])
        name = self._factors(means, lambda network, mean: mean_factor(places, *_grids(network, mean)))
        self._kernels.add("average")
        self._call("average", name, *self._ends(means[0]), places, source[0], *self._grids_of(means[0]))

    def _move(self, moves: Sequence[Operation]) -> None:
        def factor(network: IntegerModel, move: Operation) -> FixedPoint:
            source, target = _grids(network, move)
            return layer_factor(source.scale, 1.0, target)

        name = self._factors(moves, factor)
        self._kernels.add("move")
        count = prod(self._network.shapes[moves[0].output])
        self._call("move", name, *self._ends(moves[0]), count, *self._grids_of(moves[0]))

    def _concat(self, concat: Concat) -> None:
        self._kernels.add("join")
        first = 0
        shape = self._network.shapes[concat.output]
        for name in concat.inputs:
            channels = self._network.shapes[name][0]
            self._call(
                "join", self._places[name], self._places[concat.output], prod(shape[1:]), channels, first, shape[0]
            )
            first += channels

    def _maximum(self, pool: Maximum) -> None:
        self._kernels.add("maximum")
        source, target = (self._network.shapes[name] for name in (pool.inputs[0], pool.output))
        window = pool.window.planar
        numbers = [*_space(source), *_space(target), source[0], *_window_numbers(pool.name, window)]
        own = self._name(pool)
        self._tables.append(
            f"/* {comment_words(pool.name)} */\n"
            f"static const window_maximum pool_{own} = {{\n    {', '.join(map(str, numbers))}\n}};\n"
        )
        self._table_bytes += 5 * 4 + 8 * 2
        self._call("maximum", f"&pool_{own}", *self._ends(pool))

    def _reshape(self, reshape: Reshape) -> None:
        if not is_reordered(self._network, reshape):
            self._calls[-1] = self._calls[-1].replace(" */", ", the same bytes */")
            return
        self._kernels.add("reshape")
        before, after = (self._network.shapes[name] for name in (reshape.inputs[0], reshape.output))
        self._call("reshape", *self._ends(reshape), prod(before), prod(before[1:]), prod(after[1:]))

    def _factors(self, operations: Sequence[Operation], factor: Callable[[IntegerModel, Operation], FixedPoint]) -> str:
        """A table of factors, one for each width; what is passed to a function."""
        self._kernels.add("factor")
        factors = [factor(network, at_width) for network, at_width in zip(self._networks, operations, strict=True)]
        for one in factors:
            _check_factor(operations[0].name, one)
        rows = [[int(one.multiplier), int(one.exponent)] for one in factors]
        return self._rows("factor", operations[0], rows, 8)

    def _rows(self, type_name: str, operation: Operation, rows: list[list[int]], size: int) -> str:
        """A table of structures, one for each width; what is passed to a function."""
        name = f"{type_name}_{self._name(operation)}"
        body = _structs([np.array(row) for row in rows])
        self._tables.append(
            f"/* {comment_words(operation.name)} */\nstatic const {type_name} {name}[] = {{\n{body}\n}};\n"
        )
        self._table_bytes += size * len(rows)
        return f"&{name}[row]"

    def _call(self, function: str, *arguments: object) -> None:
        call = f"{function}({', '.join(map(str, arguments))});"
        self._calls += textwrap.wrap(call, COLUMNS, initial_indent="    ", subsequent_indent="        ")

    def _ends(self, operation: Operation) -> list[str]:
        return [self._places[name] for name in (*operation.inputs, operation.output)]

    def _grids_of(self, operation: Operation) -> list[str]:
        """The grids of inputs and output, as they are passed to a function."""
        return [self._grid(name) for name in (*operation.inputs, operation.output)]

    def _grid(self, value: str) -> str:
        """The table of a value's grid at every width."""
        grids = [network.grids[value] for network in self._networks]
        rows = np.array([[g.zero_point, g.low, g.high] for g in grids], np.int16) - OFFSET
        name = self._grids.get(rows.tobytes())
        if name is None:
            name = self._grids[rows.tobytes()] = f"grid_{len(self._grids)}"
            self._tables.append(f"static const grid {name}[] = {{\n{_structs(list(rows))}\n}};\n")
            self._table_bytes += rows.size
        return f"&{name}[row]"

    def _array(self, name: str, values: npt.NDArray[np.integer]) -> str:
        self._count(values)
        return array(name, values)

    def _count(self, *tables: npt.NDArray[np.integer]) -> None:
        self._table_bytes += sum(table.nbytes for table in tables)

    def _name(self, operation: Operation) -> str:
        """An identifier of its own for what belongs to an operation."""
        name = identifier(operation.name)
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name


def channels_last_rows(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Weights (out, in, *kernel) as rows (out, kernel and in), channels last within a row."""
    return np.ascontiguousarray(np.moveaxis(weight, 1, -1)).reshape(len(weight), -1)


def _kernel(name: str) -> str:
    return resources.files("tqexport.backends.c").joinpath(f"kernels/{name}.c").read_text()


def _structs(rows: Sequence[npt.NDArray[np.integer]]) -> str:
    return ",\n".join(f"    {{{', '.join(map(str, row.tolist()))}}}" for row in rows)


def _grids(network: IntegerModel, operation: Operation) -> tuple[Grid, Grid]:
    return network.grids[operation.inputs[0]], network.grids[operation.output]


def _window_numbers(name: str, window: Window, *groups: int) -> list[int]:
    """The numbers of a structure that are int16 there."""
    padding = [before for before, _ in window.padding]
    numbers = [*groups, *window.kernel, *window.stride, *window.dilation, *padding]
    if max(numbers) > np.iinfo(np.int16).max:
        raise ConversionError(f"{name} has a group, kernel, stride, dilation or padding beyond 32,767: no form in C")
    return numbers


def _space(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a value."""
    if len(shape) > 3:
        raise ConversionError(f"values of shape {tuple(shape)} have no form in C; up to two spatial axes have")
    rows, columns = (1, 1, *shape[1:])[-2:]
    return rows, columns


def _window_size(layer: Convolution) -> int:
    return int(layer.unsigned[0].size)


def _check_factor(name: str, factor: FixedPoint) -> None:
    """Refuse what ``kernels/scaling.c`` cannot shift."""
    if int(np.max(factor.exponent)) > _MOST_EXPONENT:
        raise ConversionError(
            f"one step of what {name} reads makes more than {1 << _MOST_EXPONENT} steps of its output; calibrate on "
            "samples that are normalised as in training"
        )


def _check_sums(network: IntegerModel, layer: Convolution) -> None:
    """Refuse a layer whose sums over codes may exceed 32 bits; with half steps taken off they are smaller."""
    if layer.codes is None:
        return
    grid = network.grids[layer.inputs[0]]
    largest = max(grid.high - grid.zero_point, grid.zero_point - grid.low)
    if 2 * largest * layer.codes.highest * _window_size(layer) > np.iinfo(np.int32).max:
        raise ConversionError(
            f"{layer.name} adds up {_window_size(layer):,} products, whose sum may exceed 32 bits; it has no form in C"
        )
