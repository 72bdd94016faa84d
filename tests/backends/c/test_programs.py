"""The emitted C computes what the integer model says, to the last bit, and does nothing that C leaves undefined."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from c_programs import NO_GCC, STRICT, build, render, try_program, write_program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integer_networks import CASES, WIDTHS, calibrated_case
from places import ROOT
from random_integers import integer_models

from tqexport import load_checkpoint
from tqexport.backends.c.arena import Block, blocks_of, buffers_of, is_reordered, place
from tqexport.backends.c.reading import FORMAT
from tqexport.backends.c.source import render_c
from tqexport.errors import ConversionError, InputError
from tqexport.integer.arithmetic import FixedPoint, layer_factor
from tqexport.integer.build import integer_model
from tqexport.integer.grids import Grid
from tqexport.integer.model import (
    Add,
    Convolution,
    IntegerModel,
    Maximum,
    Requantize,
    Reshape,
    Window,
)

EVERY_WIDTH = range(1, 9)

pytestmark = pytest.mark.skipif(bool(NO_GCC), reason=NO_GCC or "never")


@pytest.fixture(scope="module")
def integers(calibrated):
    """The integer models of the digits network."""
    return {bits: integer_model(calibrated, bits) for bits in EVERY_WIDTH}


def equal_lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if re.search(r"bits: 0 of \d+ output bytes differ", line)]


@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_a_file_of_one_width_is_the_integer_model_on_every_held_out_digit(integers, held_out, tmp_path, bits):
    said = try_program(tmp_path, [integers[bits]], held_out, ["-O2"])
    assert said == f"{bits} bits: 0 of {10 * len(held_out)} output bytes differ\n"
    assert len(equal_lines(try_program(tmp_path, [integers[bits]], held_out[:8]))) == 1  # with sanitizers


def test_the_run_time_file_is_the_integer_model_at_every_width(integers, held_out, tmp_path):
    for inputs, *flags in ((held_out, ["-O2"]), (held_out[:8],)):
        assert len(equal_lines(try_program(tmp_path, list(integers.values()), inputs, *flags))) == 8


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer(name, tmp_path):
    model, inputs = calibrated_case(name)
    networks = [integer_model(model, bits) for bits in WIDTHS]
    assert len(equal_lines(try_program(tmp_path, networks, inputs[:2]))) == len(WIDTHS)
    assert len(equal_lines(try_program(tmp_path, networks[1:2], inputs[:2]))) == 1


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(models=integer_models(), seed=st.integers(0, 2**32 - 1))
def test_random_networks(models, seed, tmp_path_factory):
    shape = models[0].shapes["input"]
    scale = models[0].grids["input"].scale
    inputs = (np.random.default_rng(seed).normal(size=(2, *shape)) * 60 * scale).astype(np.float32)
    assert len(equal_lines(try_program(tmp_path_factory.mktemp("random"), models, inputs))) == len(models)


def dense(bias: int, source: Grid, target: Grid, scale: float, bits: int = 4) -> IntegerModel:
    """A layer of a single weight, 1."""
    layer = Convolution(
        "only",
        ("input",),
        "output",
        np.ones((1, 1), np.int16),
        np.array([scale], np.float32),
        np.array([bias], np.int32),
        None,
        1,
        None,
        np.ones(1, np.int8),
    )
    return IntegerModel(bits, (layer,), {"input": source, "output": target}, {"input": (1,), "output": (1,)}, "output")


@pytest.mark.parametrize("bias", [2**31 - 1 - 255, -(2**31) + 255, 2**30, -(2**30)])
@pytest.mark.parametrize("exponent", [-40, -31, -8, 0, 1, 13])
def test_sums_at_the_ends_of_32_bits(tmp_path, bias, exponent):
    """The factor is the greatest below a power of 2: where it is below 1, steps and zero point overflow together."""
    source, target, scale = 1.7294965982437134, 2.344179630279541, 1.3554115295410156
    zeros = (0, 255) if bias > 0 else (255, 0)  # each sum and each zero point towards the same end
    network = dense(bias, Grid(source, zeros[0]), Grid(target, zeros[1]), scale * 2.0**exponent)
    if exponent == 0:
        assert layer_factor(source, scale, Grid(target)) == FixedPoint(2**31 - 1, 0)
    inputs = np.array([[255.0], [-255.0]], np.float32) * np.float32(source)
    assert len(equal_lines(try_program(tmp_path, [network], inputs))) == 1


def test_numbers_beyond_what_the_structures_hold_are_refused_by_name():
    network = dense(0, Grid(1.0), Grid(1.0), 1.0)
    network.shapes.update(input=(1, 70_000), output=(1, 1))
    window = Window((40_000,), (40_000,), ((0, 0),), (1,))
    pool = dataclasses.replace(network, operations=(Maximum("pool", ("input",), "output", window),))
    (layer,) = network.operations
    wide = dataclasses.replace(layer, unsigned=np.ones((1, 1, 40_000), np.int16), window=window)
    for refused, name in ((pool, "pool"), (dataclasses.replace(network, operations=(wide,)), "only")):
        with pytest.raises(ConversionError, match=f"{name} has a group, kernel, stride, dilation or padding beyond"):
            render([refused])


@settings(max_examples=200, deadline=None)
@given(models=integer_models())
def test_no_value_is_written_over_before_it_was_read(models):
    """Every byte of memory knows whose it is; whoever reads must find the values that were computed for it."""
    network = models[0]
    sizes = {value: int(np.prod(shape)) for value, shape in network.shapes.items()}
    buffers = buffers_of(network)
    outside = {"input": "input", buffers[network.output]: "output"}
    blocks = blocks_of(network, buffers, outside)
    for number, operation in enumerate(network.operations):
        if isinstance(operation, Convolution):
            blocks[f"{operation.output}/window"] = Block(2 * operation.unsigned[0].size, number, number)
            sizes[f"{operation.output}/window"] = 2 * operation.unsigned[0].size
    offsets, total = place(blocks)
    written = [op for op in network.operations if not isinstance(op, Reshape) or is_reordered(network, op)]
    memory: dict[tuple[str, int], str] = {}

    def bytes_of(value: str) -> list[tuple[str, int]]:
        buffer = buffers.get(value, value)
        start = 0 if buffer in outside else offsets[buffer]
        assert buffer in outside or start + sizes[value] <= total
        return [(outside.get(buffer, "arena"), start + i) for i in range(sizes[value])]

    computed = {"input": "input"}  # whose levels a value has: its own, or those of what it is a reshape of
    memory.update(dict.fromkeys(bytes_of("input"), "input"))
    for operation in network.operations:
        for value in operation.inputs:
            assert {memory.get(byte) for byte in bytes_of(value)} == {computed[value]}
        if operation not in written:
            computed[operation.output] = computed[operation.inputs[0]]
            continue
        own = bytes_of(operation.output)
        read = {byte for value in operation.inputs for byte in bytes_of(value)}
        if isinstance(operation, Convolution):
            scratch = bytes_of(f"{operation.output}/window")
            assert not {*scratch} & {*own, *read}
            memory.update(dict.fromkeys(scratch, "scratch"))
        if not isinstance(operation, (Add, Requantize)):  # these go level by level
            assert not {*own} & read
        computed[operation.output] = operation.output
        memory.update(dict.fromkeys(own, operation.output))
        assert not any(place == "input" for place, _ in own)
    result = bytes_of(network.output)
    assert result[0] == ("output", 0)
    assert {memory[byte] for byte in result} == {computed[network.output]}


@pytest.mark.parametrize("widths", [(2,), (8,), (1, 4, 8)])
def test_clang_has_nothing_to_say_either(integers, held_out, tmp_path, widths):
    if shutil.which("clang") is None:
        pytest.skip("clang is not installed")
    write_program(tmp_path, [integers[bits] for bits in widths], held_out[:3])
    done = subprocess.run([build(tmp_path, "-O2", compiler="clang")], capture_output=True, text=True)
    assert (done.returncode, len(equal_lines(done.stdout))) == (0, len(widths))


def test_the_header_serves_cpp_and_the_object_needs_nothing(integers, held_out, tmp_path):
    """No heap, no libm, no float, no libgcc: the object has no undefined symbol, and writes nothing but its arena."""
    write_program(tmp_path, [integers[2], integers[8]], held_out[:1])
    user = '#include "net.h"\nint main() { return net_run(nullptr, nullptr, 3) - NET_BAD_WIDTH; }\n'
    (tmp_path / "user.cpp").write_text(user)
    subprocess.run(["gcc", *STRICT, "-O2", "-fno-builtin", "-c", "net.c"], cwd=tmp_path, check=True)
    undefined = subprocess.run(["nm", "--undefined-only", "net.o"], cwd=tmp_path, capture_output=True, text=True)
    assert undefined.stdout == ""
    data = subprocess.run(["size", "-A", "net.o"], cwd=tmp_path, capture_output=True, text=True).stdout
    sizes = {line.split()[0]: int(line.split()[1]) for line in data.splitlines() if re.match(r"\.\w", line)}
    arena = int(re.search(r"NET_ARENA_BYTES (\d+)", (tmp_path / "net.h").read_text())[1])
    assert (sizes[".data"], sizes[".bss"]) == (0, -(-arena // 32) * 32 if arena % 32 else arena)
    source = re.sub(r"/\*.*?\*/", "", (tmp_path / "net.c").read_text(), flags=re.DOTALL)
    assert not re.search(r"\b(float|double|malloc|__\w+)\b", source)
    if shutil.which("g++"):
        subprocess.run(["g++", "-Wall", "-Werror", "-o", "user", "user.cpp", "net.o"], cwd=tmp_path, check=True)
        assert subprocess.run([tmp_path / "user"]).returncode == 0


def test_a_wrong_width_leaves_the_output_alone(integers, held_out, tmp_path):
    write_program(tmp_path, [integers[2], integers[4]], held_out[:1])
    (tmp_path / "net_test.c").write_text("""
#include "net.h"
static int8_t input[NET_INPUT_BYTES], output[NET_OUTPUT_BYTES];
int main(void)
{
    static const unsigned wrong[] = {0, 1, 3, 5, 8, 9, 258, 4294967298U & 0xFFFFFFFFU, 0xFFFFFFFFU};
    unsigned i;
    output[0] = 77;
    for (i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        if (wrong[i] != 2 && (net_run(input, output, wrong[i]) != NET_BAD_WIDTH || output[0] != 77)) {
            return 1;
        }
    }
    return net_run(input, output, 4);
}
""")
    assert subprocess.run([build(tmp_path)]).returncode == 0


def test_a_damaged_number_is_noticed_by_the_test_program(integers, held_out, tmp_path):
    write_program(tmp_path, [integers[4]], held_out[:3])
    source = (tmp_path / "net.c").read_text()
    (tmp_path / "net.c").write_text(re.sub(r"(biases_fc\[10\] = \{\s*)-?\d+", r"\g<1>12345", source))
    done = subprocess.run([build(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert not equal_lines(done.stdout)


def test_codes_of_a_narrow_file_are_packed(integers):
    sizes = {bits: render([network]).table_bytes for bits, network in integers.items()}
    codes = sum(
        layer.codes.codes.size
        for layer in integers[8].operations
        if isinstance(layer, Convolution) and layer.codes is not None
    )
    rest = sizes[8] - codes
    for bits in (1, 2, 4):
        assert sizes[bits] <= rest + codes * bits / 8 + 100
    assert sizes[2] < 30_000


def test_names_that_are_no_identifiers(integers, tmp_path):
    """Names of modules and files come from others: none may end a comment or clash."""
    network = integers[2]
    names = ["a*/ int x; /*", "a__ int x; __", "ünï\\", "??/"]
    layers = [op for op in network.operations if isinstance(op, Convolution)][: len(names)]
    renamed = {id(layer): name for layer, name in zip(layers, names, strict=True)}
    operations = tuple(
        dataclasses.replace(op, name=renamed[id(op)]) if id(op) in renamed else op for op in network.operations
    )
    program = render([dataclasses.replace(network, operations=operations)], "4 my-näme")
    (tmp_path / "4 my-näme.c").write_text(program.source)
    (tmp_path / "4 my-näme.h").write_text(
        "#include <stdint.h>\n#define NET_4_MY_N_ME_ARENA_BYTES 10000\n"
        "#define NET_4_MY_N_ME_BAD_WIDTH (-1)\nint net_4_my_n_me_run(const int8_t *, int8_t *, unsigned);\n"
    )
    subprocess.run(["gcc", *STRICT, "-Wcomment", "-c", "4 my-näme.c"], cwd=tmp_path, check=True)
    with pytest.raises(InputError, match="rename the checkpoint"):
        render([network], 'a"b')


def test_sums_beyond_32_bits_and_widths_that_differ_are_refused_by_name(integers):
    network = integers[8]
    layer = next(op for op in network.operations if isinstance(op, Convolution) and op.codes is not None)
    long = np.repeat(layer.unsigned, 230, 1)
    codes = dataclasses.replace(layer.codes, codes=np.repeat(layer.codes.codes, 230, 1))
    wide = dataclasses.replace(layer, unsigned=long, codes=codes)
    with pytest.raises(ConversionError, match=f"{layer.name} adds up 33,120 products, whose sum may exceed 32 bits"):
        render([dataclasses.replace(network, operations=(wide,), output=wide.output)])
    shorter = dataclasses.replace(integers[2], operations=integers[2].operations[:-1])
    with pytest.raises(InputError, match="2 bits take other steps than 8"):
        render_c([network, shorter], "net", None)


@pytest.mark.parametrize(
    ("widths", "sha256"),
    [
        ((4,), "099c4a454eafaaacecacbbcbd1acc73b869afc67b90461977c0799def721c83f"),
        (tuple(EVERY_WIDTH), "5d37a9507af98e091a491ae071968104bf4a8586b2a66f2dfbfdaef25b04076a"),
    ],
)
def test_another_text_is_another_format(widths, sha256):
    """Files are compared letter by letter, so those of before must say that they are of before: raise FORMAT."""
    model = load_checkpoint(ROOT / "fixtures" / "digits-resnet8-int.pt")
    source = render([integer_model(model, bits) for bits in widths]).source
    assert (FORMAT, hashlib.sha256(source.encode()).hexdigest()) == (1, sha256)
