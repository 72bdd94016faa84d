"""The emitted C on a Cortex-M4, as an emulator has it: every output byte is the integer model's."""

from __future__ import annotations

import pytest
from c_programs import STRICT, write_program
from device import ABSENT, cross_compile, emulate, section_sizes

from tqexport.integer.build import integer_model

pytestmark = pytest.mark.skipif(bool(ABSENT), reason=ABSENT or "never")


@pytest.mark.parametrize("widths", [(1,), (2,), (4,), (8,), (1, 2, 4, 8)])
def test_every_output_byte_is_the_integer_models(calibrated, held_out, tmp_path, widths):
    networks = [integer_model(calibrated, bits) for bits in widths]
    program = write_program(tmp_path, networks, held_out[:20])
    said = emulate(cross_compile(tmp_path, ["net_test.c", "net.c"], "tried.elf", STRICT[1:]))
    assert said.splitlines() == [f"{bits} bits: 0 of 200 output bytes differ" for bits in widths]
    sizes = section_sizes(tmp_path, "net.c")
    assert sizes[".bss"] == program.arena_bytes
    assert sizes.get(".data", 0) == 0
    assert abs(sizes[".rodata"] - program.table_bytes) <= 64  # what the head of the file says is true
    assert sizes[".text"] < 3_000
