"""Random integer models, of which no PyTorch network need exist."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from tqexport.integer.grids import Grid
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
from tqexport.integer.weights import LARGEST, Codes
from tqexport.truncation import max_code

__all__ = ["integer_models"]


class _Growing:
    """Models of several widths that grow operation by operation, all of one structure."""

    def __init__(self, draw: Any, widths: list[int]) -> None:
        self.draw, self.widths = draw, widths
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        rank = draw(st.integers(0, 2))
        space = tuple(draw(st.integers(1, 7)) for _ in range(rank))
        self.shapes = {INPUT: (draw(st.integers(1, 6)), *space)}
        self.grids: list[dict[str, Grid]] = [{INPUT: self.grid()} for _ in widths]
        self.operations: list[list[Operation]] = [[] for _ in widths]
        self.order = [INPUT]

    def grid(self) -> Grid:
        rng = self.rng
        if rng.random() < 0.3:  # an activation quantiser
            highest = int(rng.choice([1, 3, 7, 15, 31, 63, 127, 255]))
            return Grid(float(np.float32(1 / highest)), high=highest)
        zero = int(rng.integers(0, 256))
        low = zero if zero < 255 and rng.random() < 0.2 else 0
        return Grid(float(np.float32(rng.uniform(0.004, 0.05))), zero, low)

    def added(self, make: Any, shape: tuple[int, ...], grids: list[Grid]) -> None:
        output = f"v{len(self.order)}"
        self.shapes[output] = shape
        for number, grid in enumerate(grids):
            self.grids[number][output] = grid
            self.operations[number].append(make(number, output))
        self.order.append(output)

    def grids_of(self, value: str) -> list[Grid]:
        return [grids[value] for grids in self.grids]

    def new_grids(self) -> list[Grid]:
        return [self.grid() for _ in self.widths]

    def window(self, space: tuple[int, ...], *, pool: bool) -> Window:
        parts = []
        for size in space:
            kernel = int(self.rng.integers(1, min(4, size) + 1))
            dilation = int(self.rng.integers(1, 3)) if (kernel - 1) * 2 + 1 <= size else 1
            most = kernel // 2 if pool else 3  # every window of a maximum holds a real level
            padding = tuple(int(n) for n in self.rng.integers(0, most + 1, 2)) if not pool or dilation == 1 else (0, 0)
            parts.append((kernel, int(self.rng.integers(1, 4)), padding, dilation))
        return Window(*zip(*parts, strict=True))

    def convolution(self, source: str) -> None:
        channels, *space = self.shapes[source]
        window = self.window(tuple(space), pool=False) if space else None
        divisors = [n for n in range(1, channels + 1) if channels % n == 0] if window else [1]
        groups = int(self.rng.choice(divisors))
        out = groups * int(self.rng.integers(1, 4))
        kernel = window.kernel if window else ()
        shape = (out, channels // groups, *kernel)
        quantized = self.rng.random() < 0.7
        stored = self.rng.integers(0, 256, shape).astype(np.uint8)
        plain = self.rng.integers(-LARGEST, LARGEST + 1, shape).astype(np.int16)
        target = self.new_grids()

        def make(number: int, output: str) -> Convolution:
            bits = self.widths[number]
            highest = max_code(bits)
            codes = Codes(stored, 8 - bits, highest, max(1, LARGEST // highest)) if quantized else None
            unsigned = plain
            if codes:
                levels = 2 * (stored >> np.uint8(codes.shift)).astype(np.int16) - np.int16(highest)
                unsigned = levels * np.int16(codes.multiplier)
            factor = self.rng.uniform(0.001, 0.02, out) * np.exp2(self.rng.integers(-6, 4, out))
            scale = (factor * target[number].scale / self.grids[number][source].scale).astype(np.float32)
            return Convolution(
                f"layer{len(self.order)}",
                (source,),
                output,
                unsigned,
                scale,
                self.rng.integers(-20000, 20000, out).astype(np.int32),
                window,
                groups,
                codes,
                self.rng.choice([-1, 0, 1, 1], out).astype(np.int8),
            )

        self.added(make, (out, *self.sizes(space, window)), target)

    @staticmethod
    def sizes(space: Any, window: Window | None) -> tuple[int, ...]:
        if window is None:
            return ()
        return tuple(
            (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                space, window.kernel, window.stride, window.padding, window.dilation, strict=True
            )
        )

    def step(self) -> None:
        draw = self.draw
        source = draw(st.sampled_from(self.order))
        shape = self.shapes[source]
        name = f"step{len(self.order)}"
        alike = [value for value in self.order if self.shapes[value] == shape]
        match draw(st.sampled_from(["conv", "conv", "add", "mean", "cat", "max", "move", "reshape"])):
            case "add":
                other = draw(st.sampled_from(alike))
                self.added(lambda _, out: Add(name, (source, other), out), shape, self.new_grids())
            case "mean" if len(shape) > 1:
                keep = draw(st.booleans())
                after = (shape[0], *[1] * (len(shape) - 1)) if keep else shape[:1]
                self.added(lambda _, out: Average(name, (source,), out, keep), after, self.new_grids())
            case "cat":
                joined = tuple(draw(st.lists(st.sampled_from(alike), min_size=1, max_size=3)))
                joined = tuple(value for value in joined if self.grids_of(value) == self.grids_of(joined[0]))
                grids = self.grids_of(joined[0])
                after = (sum(self.shapes[value][0] for value in joined), *shape[1:])
                self.added(lambda _, out: Concat(name, joined, out), after, grids)
            case "max" if len(shape) > 1:
                window = self.window(shape[1:], pool=True)
                grids = self.grids_of(source)
                after = (shape[0], *self.sizes(shape[1:], window))
                self.added(lambda _, out: Maximum(name, (source,), out, window), after, grids)
            case "move":
                self.added(lambda _, out: Requantize(name, (source,), out), shape, self.new_grids())
            case "reshape":
                count = int(np.prod(shape))
                channels = draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
                after = draw(st.sampled_from([(count,), (channels, count // channels)]))
                self.added(lambda _, out: Reshape(name, (source,), out), after, self.grids_of(source))
            case _:
                self.convolution(source)


@st.composite
def integer_models(draw: Any) -> list[IntegerModel]:
    """Integer models of one network at one width or several, ascending."""
    widths = draw(st.one_of(st.lists(st.integers(1, 8), min_size=1, max_size=1), st.just([1, 3, 8])))
    growing = _Growing(draw, widths)
    for _ in range(draw(st.integers(1, 6))):
        growing.step()
    if isinstance(growing.operations[0][-1], Reshape):  # which may be nothing but the input
        growing.convolution(growing.order[-1])
    return [
        IntegerModel(bits, tuple(operations), grids, growing.shapes, growing.order[-1])
        for bits, operations, grids in zip(widths, growing.operations, growing.grids, strict=True)
    ]
