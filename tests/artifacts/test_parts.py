"""Delivery in parts: the first runs at once, both give the whole file back, and whatever is changed is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from commands import run
from places import artifact, files

from tqexport.artifacts.parts import joined, rest_of
from tqexport.artifacts.truncate import open_artifact
from tqexport.backends import BACKENDS
from tqexport.backends.onnx.integer_runtime_file import runtime_integer_onnx
from tqexport.backends.onnx.packing import pack_onnx
from tqexport.backends.onnx.truncatable import truncatable_onnx
from tqexport.errors import InputError, UsageError
from tqexport.integer.build import integer_model
from tqexport.integer.names import PACKED


def split(content, bits):
    """Both parts of a file."""
    whole = open_artifact(content)
    first = whole.truncate(bits, packed=True)
    return first, rest_of(whole, first, bits)


def join(folder, first, rest):
    (folder / "first.onnx").write_bytes(first)
    (folder / "rest.zip").write_bytes(rest)
    return joined(folder / "first.onnx", folder / "rest.zip")[1]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_first_part_is_the_packed_file_and_both_give_the_whole(exported_once, runtime_onnx, tmp_path, bits):
    first, rest = split(runtime_onnx, bits)
    assert first == pack_onnx(artifact(exported_once, "onnx", bits))
    assert (first, rest) == split(runtime_onnx, bits)
    assert len(first) + len(rest) < (1.04 if bits == 3 else 0.97) * len(runtime_onnx)
    assert join(tmp_path, first, rest) == runtime_onnx


def test_other_files_with_several_widths_come_in_parts_too(exported_once, calibrated, held_out, tmp_path):
    fixed = {bits: artifact(exported_once, "onnx", bits) for bits in (2, 4, 8)}
    for _, content in truncatable_onnx(fixed.items(), (2, 8)):
        assert join(tmp_path, *split(content, 2)) == content
    integers = runtime_integer_onnx(calibrated, [2, 4])
    first, rest = split(integers, 2)
    assert join(tmp_path, first, rest) == integers
    assert open_artifact(first).facts.kernel == PACKED
    network = integer_model(calibrated, 2)
    (runtime,) = BACKENDS["onnx"].open_integers(first, lambda _: network, 2, switched=False)
    expected = network.run(held_out[:8], runtime.rounding)[network.output]
    assert np.array_equal(runtime.run_untouched(held_out[:8]), expected)


WITHOUT = "import sys; sys.modules.update({'torch': None, 'onnxruntime': None}); from tqexport.cli import main; main()"


def test_the_commands_need_neither_pytorch_nor_a_runtime(runtime_onnx, exported_once, tmp_path):
    (tmp_path / "ckpt.onnx").write_bytes(runtime_onnx)
    for line in (
        ["split", "ckpt.onnx", "-o", "sent"],
        ["join", "sent/ckpt-w2-exact-packed.onnx", "sent/ckpt-w2-rest.zip", "-o", "made"],
    ):
        done = subprocess.run([sys.executable, "-c", WITHOUT, *line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "made" / "ckpt.onnx").read_bytes() == runtime_onnx
    assert files(tmp_path / "sent") == ["ckpt-w2-exact-packed.onnx", "ckpt-w2-rest.zip"]
    (tmp_path / "plain.onnx").write_bytes(artifact(exported_once, "onnx", 2))
    pair = run("verify", "sent/ckpt-w2-exact-packed.onnx", "plain.onnx", "--samples", "2", cwd=tmp_path)
    assert (pair.returncode, "PASS: the artifacts are equal" in pair.stdout) == (0, True)


# What is refused


@pytest.fixture(scope="module")
def parts(runtime_onnx):
    return split(runtime_onnx, 2)


def with_record(rest, folder, members=None, **changes):
    """A rest that says something else of itself, or has other members."""
    members = members or {}
    (folder / "before.zip").write_bytes(rest)
    with zipfile.ZipFile(folder / "before.zip") as before, zipfile.ZipFile(folder / "after.zip", "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if name == "parts.json":
                content = json.dumps({**json.loads(content), **changes}).encode()
            after.writestr(name, members.get(name, content))
    return (folder / "after.zip").read_bytes()


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


def test_damaged_parts_are_refused_wherever_the_damage_is(parts, tmp_path):
    first, rest = parts
    for place in range(3, len(first), len(first) // 12):
        with pytest.raises(InputError):
            join(tmp_path, flipped(first, place), rest)
    for place in range(3, len(rest), len(rest) // 24):
        try:
            whole = join(tmp_path, first, flipped(rest, place))
        except InputError as error:
            assert "rest.zip" in str(error)  # noqa: PT017
        else:  # a date, which means nothing
            assert whole == join(tmp_path, first, rest)
    for cut in (0, 40, len(rest) // 2, len(rest) - 1):
        with pytest.raises(InputError, match=r"rest.zip is a damaged archive"):
            join(tmp_path, first, rest[:cut])


def test_a_rest_that_was_made_up_is_refused(parts, tmp_path):
    first, rest = parts
    for changes in (
        {"file": "../ckpt.onnx"},
        {"file": ""},
        {"width": 0},
        {"width": "2"},
        {"schema_version": 2},
        {"further": 1},
    ):
        with pytest.raises(InputError, match="is no rest that this tqexport split wrote"):
            join(tmp_path, first, with_record(rest, tmp_path, **changes))
    for changes in (
        {"width": 3},
        {"sha256": "0" * 64},
        {"members": {"codes": b""}},
        {"members": {"codes": b"1" * 57_216}},
        {"members": {"graph.onnx": b"no"}},
    ):
        with pytest.raises(InputError, match=r"rest\.zip was changed or damaged since its export"):
            join(tmp_path, first, with_record(rest, tmp_path, **changes))


def test_parts_of_two_files_are_refused_by_the_command(parts, runtime_onnx, exported_once, tmp_path):
    _, other = split(runtime_onnx, 4)
    for name, content in (("first.onnx", parts[0]), ("other.zip", other), ("rest.zip", parts[1])):
        (tmp_path / name).write_bytes(content)
    done = run("join", "first.onnx", "other.zip", cwd=tmp_path)
    assert done.returncode == 3
    assert "first.onnx is not the file of 4 bits that other.zip was made with" in done.stderr
    done = run("split", "first.onnx", cwd=tmp_path)
    assert done.returncode == 3
    assert "holds one width only (2 bits), so no other width can be cut from it" in done.stderr
    assert files(tmp_path) == ["first.onnx", "other.zip", "rest.zip"]


def test_another_file_of_that_name_is_left_alone(runtime_onnx, tmp_path):
    (tmp_path / "ckpt.onnx").write_bytes(runtime_onnx)
    assert run("split", "ckpt.onnx", cwd=tmp_path).returncode == 0
    (tmp_path / "ckpt.onnx").write_bytes(b"something else")
    done = run("join", "ckpt-w2-exact-packed.onnx", "ckpt-w2-rest.zip", cwd=tmp_path)
    assert done.returncode == 2
    assert "ckpt.onnx is another file already" in done.stderr
    assert (tmp_path / "ckpt.onnx").read_bytes() == b"something else"


def test_what_has_no_parts_says_so(runtime_onnx, runtime_tflite, tmp_path):
    for width in (5, 8):
        with pytest.raises(UsageError, match="fit into a byte, so packing them saves nothing"):
            split(runtime_onnx, width)
    (tmp_path / "ckpt.tflite").write_bytes(runtime_tflite)
    done = run("split", "ckpt.tflite", cwd=tmp_path)
    assert (done.returncode, files(tmp_path)) == (2, ["ckpt.tflite"])
    assert "TFLite files are not delivered in parts; split the ONNX file of the network" in done.stderr
