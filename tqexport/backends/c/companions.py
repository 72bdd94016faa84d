"""What lies beside ``NAME.c``: the header that says how to call it, and a program that tries it on samples."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt

from tqexport.backends.c.source import BAD_WIDTH
from tqexport.backends.c.text import array, comment_words, prefix_of
from tqexport.backends.tflite.layout import to_channels_last
from tqexport.integer.grids import OFFSET, Grid
from tqexport.integer.model import IntegerModel
from tqexport.integer.naming import INPUT

__all__ = ["header", "test_program"]


def header(networks: Sequence[IntegerModel], stem: str, arena_bytes: int) -> str:
    """The text of ``NAME.h``.

    Args:
        networks: The integer model of each width in ``NAME.c``.
        stem: The name of the file without ``.c``.
        arena_bytes: See :class:`tqexport.backends.c.source.Program`.
    """
    network, name = networks[0], prefix_of(stem)
    big = name.upper()
    widths = ", ".join(str(network.bits) for network in networks)
    scales = [line for network in networks for line in _scales(network, big)]
    return f"""/* How to run {comment_words(stem)}.c, written by tqexport. */
#ifndef {big}_H
#define {big}_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

#define {big}_INPUT_BYTES {prod(network.shapes[INPUT])} /* {_described(network, INPUT)} */
#define {big}_OUTPUT_BYTES {prod(network.shapes[network.output])} /* {_described(network, network.output)} */
#define {big}_ARENA_BYTES {arena_bytes} /* of memory, one static array */
#define {big}_BAD_WIDTH ({BAD_WIDTH})

/* Runs the network on one sample.
 *
 * input   {big}_INPUT_BYTES levels; a number x is the level round(x / SCALE) + ZERO, cut to -128 to 127, with
 *         SCALE and ZERO of the width. Not changed.
 * output  gets {big}_OUTPUT_BYTES levels; a level q stands for (q - ZERO) * SCALE. May not overlap the input.
 * bits    the width of the weights: {widths}.
 *
 * Returns 0, or {big}_BAD_WIDTH for a width that is not there, and then leaves the output as it was. One call
 * at a time: the memory for values is static. */
int {name}_run(const int8_t *input, int8_t *output, unsigned bits);

/* The grids of input and output at each width, for the caller; the network itself computes in integers. */
{chr(10).join(scales)}

#ifdef __cplusplus
}}
#endif

#endif
"""


def test_program(networks: Sequence[IntegerModel], stem: str, inputs: npt.NDArray[np.float32]) -> str:
    """The text of ``NAME_test.c``, which compares every output of some samples and returns 0 if all are right.

    Args:
        networks: The integer model of each width in ``NAME.c``.
        stem: The name of the file without ``.c``.
        inputs: float32 (N, *input_shape) channels first, normalised.
    """
    name = prefix_of(stem)
    big = name.upper()
    levels, outputs = [], []
    for network in networks:
        values = network.run(inputs, "tflm")
        levels.append(_int8(values[INPUT]))
        outputs.append(_int8(values[network.output]))
    same = all(np.array_equal(one, levels[0]) for one in levels)
    widths = np.array([network.bits for network in networks], np.uint8)
    samples = array("samples", np.stack(levels[:1] if same else levels))
    expected = array("expected", np.stack(outputs))
    return f"""/* Tries {comment_words(stem)}.c on {len(inputs)} samples at every width; written by tqexport. */
#include "{stem}.h"

#include <stdio.h>

#define SAMPLES {len(inputs)}

{array("widths", widths)}
/* {"One" if same else "For each width, one"} after the other. */
{samples}
/* For each width, those of one sample after the other. */
{expected}
int main(void)
{{
    static int8_t output[{big}_OUTPUT_BYTES];
    const int8_t *right = expected;
    unsigned long row, sample, i, wrong = 0;
    for (row = 0; row < sizeof widths; row++) {{
        const int8_t *input = samples{"" if same else f" + row * SAMPLES * {big}_INPUT_BYTES"};
        unsigned long differing = 0;
        for (sample = 0; sample < SAMPLES; sample++) {{
            if ({name}_run(input + sample * {big}_INPUT_BYTES, output, widths[row]) != 0) {{
                printf("%u bits do not run\\n", (unsigned)widths[row]);
                return 1;
            }}
            for (i = 0; i < {big}_OUTPUT_BYTES; i++) {{
                differing += output[i] != *right++;
            }}
        }}
        printf("%u bits: %lu of %lu output bytes differ\\n", (unsigned)widths[row], differing,
               (unsigned long)SAMPLES * {big}_OUTPUT_BYTES);
        wrong += differing;
    }}
    return wrong != 0;
}}
"""


def _scales(network: IntegerModel, prefix: str) -> list[str]:
    """Macros for the grids of input and output."""

    def lines(end: str, grid: Grid) -> list[str]:
        return [
            f"#define {prefix}_W{network.bits}_{end}_SCALE {float(np.float32(grid.scale))!r}f",
            f"#define {prefix}_W{network.bits}_{end}_ZERO ({grid.zero_point - OFFSET})",
        ]

    return lines("INPUT", network.grids[INPUT]) + lines("OUTPUT", network.grids[network.output])


def _described(network: IntegerModel, value: str) -> str:
    channels, *space = network.shapes[value]
    return f"int8 ({', '.join(map(str, (*space, channels)))}), channels last"


def _int8(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Levels (N, C, ...) as int8 (N, bytes), channels last."""
    last = to_channels_last((levels.astype(np.int16) - OFFSET).astype(np.int8))
    return last.reshape(len(levels), -1)
