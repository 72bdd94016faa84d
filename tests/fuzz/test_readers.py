"""A slice of ``make fuzz``, and what once broke a reader, kept as the recipe that makes it."""

from __future__ import annotations

import io
import json
import os
import zipfile
from random import Random

import flatbuffers
import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from harness import Figures, watched
from places import DATA, DIGITS
from run import READERS, reader_named

from tqexport import CheckpointInfo, ReadOptions, load_checkpoint, save_checkpoint
from tqexport.artifacts.manifest import read_manifest
from tqexport.artifacts.truncate import open_artifact
from tqexport.backends.onnx.file import parse
from tqexport.backends.tflite.door import check_tflite
from tqexport.errors import InputError, UsageError
from tqexport.model import InputInfo
from tqexport.reading.apart import Apart
from tqexport.reading.files import read_bytes
from tqexport.verification.pair import ArtifactAtWidth, compare_artifacts, open_pair, samples_for
from tqexport.verification.samples import read_samples

# Few of the slow ones: the whole slice takes seconds.
COUNTS = {"tflite": 6, "onnx": 8, "c": 10, "checkpoint": 8, "grids": 2, "research": 3, "manifest": 100, "samples": 60}
SVHN = DATA / "v0.1/svhnq-w4.tflite"


@pytest.mark.filterwarnings("ignore")  # of what makes the hostile inputs
@pytest.mark.parametrize("name", [name for name in READERS if name != "commands"])  # which export first
def test_hostile_inputs_are_read_or_refused_in_a_sentence(tmp_path, name):
    reader, figures = reader_named(name), Figures(name)
    for seed in range(COUNTS.get(name, 10)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        watched(reader, seed, folder, figures)
    assert not figures.broken, figures.remarks
    assert figures.refused  # they are hostile indeed


FOUND = {  # by reader, seeds that once ended in a traceback, whose corpus is made the same since
    "c": [3643],
    "tflite": [300088, 301820, 1002583],
    "onnx": [300221, 300480, 302385, 302717, 302773, 7000193],
    "checkpoint": [400483],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name, seeds in FOUND.items() for seed in seeds])
def test_what_longer_runs_found(tmp_path, name, seed):
    figures = Figures(name)
    watched(reader_named(name), seed, tmp_path, figures)
    assert not figures.broken, figures.remarks
    assert not figures.remarks  # which tell of sentences that are none, too


# TFLite


def with_change(change):
    """A right file in which something was changed, written again as it is."""
    model = schema.ModelT.InitFromPackedBuf(SVHN.read_bytes(), 0)
    change(model)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def tensor_beyond(model):
    model.subgraphs[0].operators[3].inputs = np.array([99_999, 1, 2], np.int32)


def buffer_beyond(model):
    model.subgraphs[0].tensors[2].buffer = 2**31


def larger_than_its_bytes(model):
    tensor = next(tensor for tensor in model.subgraphs[0].tensors if model.buffers[tensor.buffer].data is not None)
    tensor.shape = np.array([4, *tensor.shape], np.int32)


def negative(model):
    model.subgraphs[0].tensors[0].shape = np.array([1, -40, 40, 3], np.int32)


def fills_memory(model):
    model.subgraphs[0].tensors[0].shape = np.array([1, 40_000, 40_000, 3], np.int32)


def calls_itself(model):
    model.operatorCodes[0].builtinCode = schema.BuiltinOperator.WHILE


def no_operator(model):
    model.operatorCodes[0].builtinCode = 31_000


def without_a_filter(model):
    for operator in model.subgraphs[0].operators:
        operator.inputs = operator.inputs[:1]


def grid_of_another_shape(model):
    for tensor in model.subgraphs[0].tensors:
        if tensor.quantization is not None and tensor.quantization.scale is not None:
            tensor.quantization.scale = np.repeat(tensor.quantization.scale, 7).astype(np.float32)


def without_operators(model):
    model.subgraphs[0].operators = None


def without_inputs(model):
    model.subgraphs[0].operators[-1].inputs = None


def half_bytes_of_another_size(model):
    tensor = next(tensor for tensor in model.subgraphs[0].tensors if model.buffers[tensor.buffer].data is not None)
    tensor.type = schema.TensorType.INT4


def sparse(model):
    model.subgraphs[0].tensors[2].sparsity = schema.SparsityParametersT()


@pytest.mark.parametrize(
    "change",
    [
        *(tensor_beyond, buffer_beyond, larger_than_its_bytes, negative, fills_memory, calls_itself, no_operator),
        *(without_a_filter, grid_of_another_shape, without_operators, without_inputs, half_bytes_of_another_size),
        sparse,
    ],
)
def test_a_tflite_file_that_is_whole_but_wrong_is_refused_before_a_runtime_sees_it(change):
    with pytest.raises(InputError):
        check_tflite(with_change(change))


def test_right_tflite_files_pass():
    for path in DATA.glob("v0.1*/*.tflite"):
        check_tflite(path.read_bytes())
    check_tflite(with_change(lambda _: None))


def test_offsets_out_of_a_tflite_file_are_refused():
    content = SVHN.read_bytes()
    random = Random(0)
    for _ in range(40):
        damaged = bytearray(content)
        place = random.randrange(len(content) - 4) & ~3
        damaged[place : place + 4] = random.choice((b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xf0\xff\xff\xff"))
        try:
            check_tflite(bytes(damaged))
        except InputError:
            continue
        model = schema.ModelT.InitFromPackedBuf(bytes(damaged), 0)  # which reads all of what was let through
        assert model.subgraphs


# A process of its own


def test_the_death_of_a_process_is_a_sentence_and_the_next_one_starts():
    apart = Apart(seconds=20)
    with pytest.raises(InputError, match=r"ends the process that runs it \(SIGABRT\)"):
        apart.open("os:abort")
    opened = apart.open("collections:Counter", "aab")
    assert opened.call("total") == 3
    with pytest.raises(InputError, match="cannot be run: TypeError"):
        opened.call("total", "too", "many")
    with pytest.raises(InputError, match="gives answers that no runtime gives"):
        opened.call("copy")  # a Counter, which is neither an array nor a record of them


def test_time_and_memory_of_the_process_are_limited():
    with pytest.raises(InputError, match=r"takes more than 0.5 seconds"):
        Apart(seconds=0.5).open("time:sleep", 60)
    with pytest.raises(InputError, match="takes more memory"):
        Apart(memory=1 << 30).open("builtins:bytearray", 4 << 30)


def test_memory_of_the_process_follows_what_it_is_given():
    apart = Apart()
    with pytest.raises(InputError, match="takes more memory"):
        apart.open("builtins:bytearray", 600 << 20)  # for nothing that was sent
    apart.open("builtins:len", bytes(8 << 20))
    opened = apart.open("numpy:zeros", 1)
    assert opened.call("repeat", 8 << 20).size == 8 << 20  # 64 MiB
    with pytest.raises(InputError, match="takes more memory"):
        opened.call("repeat", 40 << 20)  # which fits, but not what it is sent back as


def test_the_process_lets_go_of_what_nobody_asks_for_any_more():
    apart = Apart()
    for _ in range(4):  # two of them do not fit
        apart.open("builtins:bytearray", 300 << 20)


def test_the_process_does_not_import_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "colorsys.py").write_text("open('executed', 'w').close()")
    monkeypatch.chdir(tmp_path)
    Apart().open("colorsys:rgb_to_hls", 0.1, 0.2, 0.3)
    assert [path.name for path in tmp_path.iterdir()] == ["colorsys.py"]


# ONNX


def onnx_with(change):
    model = onnx.load(DATA / "v0.1/svhnq-w4.onnx")
    change(model)
    return model.SerializeToString()


def outside(model):
    tensor = model.graph.node.add(op_type="Constant", output=["c"]).attribute.add(name="value", type=4).t
    tensor.data_type, tensor.data_location = onnx.TensorProto.FLOAT, onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def not_its_size(model):
    model.graph.initializer[0].dims[0] += 1


def deep_json(model):
    for entry in model.metadata_props:
        entry.value = "[" * 100_000


def text_as_a_constant(model):
    tensor = model.graph.initializer.add(name="text", data_type=onnx.TensorProto.STRING, dims=[1])
    tensor.string_data.append(b"text")


def unknown_type(model):
    model.graph.output[0].type.tensor_type.elem_type = 16_777_216


def attribute_of_a_function(model):
    model.graph.node[0].attribute.add(name="to", type=onnx.AttributeProto.INT, ref_attr_name="x")


def too_many_dimensions(model):
    model.graph.initializer.add(name="deep", data_type=onnx.TensorProto.FLOAT, dims=[0] + [2**40] * 40)


@pytest.mark.parametrize(
    "change", [outside, not_its_size, text_as_a_constant, unknown_type, attribute_of_a_function, too_many_dimensions]
)
def test_an_onnx_file_that_is_whole_but_wrong_is_refused(change):
    with pytest.raises(InputError):
        parse(onnx_with(change))


def two_shifts(model):
    shift = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(".shift"))
    shift.dims[:], shift.raw_data = [2], shift.raw_data * 2


def shift_of_everything(model):
    next(tensor for tensor in model.graph.initializer if tensor.name.endswith(".shift")).raw_data = b"\x09"


def codes_of_floats(model):
    codes = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(".codes"))
    codes.data_type, codes.raw_data = onnx.TensorProto.FLOAT, codes.raw_data * 4


@pytest.mark.parametrize("change", [two_shifts, shift_of_everything, codes_of_floats])
def test_onnx_codes_that_cannot_be_read_are_refused(change):
    artifact = open_artifact(onnx_with(change))
    with pytest.raises(InputError, match="export it again"):
        artifact.backend.codes(artifact.content, 4)
    with pytest.raises(InputError, match="export it again"):
        artifact.backend.pack(artifact.content)


def test_an_onnx_file_whose_sizes_have_no_numbers_gets_no_random_samples():
    def change(model):
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"

    with pytest.raises(InputError, match="takes input of batchx3xheightx40"):
        samples_for(ArtifactAtWidth(open_artifact(onnx_with(change)), 4), None, 2)


def test_metadata_that_is_nested_too_deeply_is_refused():
    with pytest.raises(InputError):
        open_artifact(onnx_with(deep_json))


def test_two_files_whose_activations_have_other_shapes_differ(tmp_path):
    def change(model):
        convolution = next(node for node in model.graph.node if node.op_type == "Conv")
        next(each for each in convolution.attribute if each.name == "pads").ints[:] = [3, 3, 3, 3]
        del model.graph.value_info[:]

    (tmp_path / "padded.onnx").write_bytes(onnx_with(change))
    pair = open_pair((DATA / "v0.1/svhnq-w4.onnx", tmp_path / "padded.onnx"), None)
    problems = compare_artifacts(pair, samples_for(pair[0], None, 2)).problems
    assert problems[0].startswith("activation layers.2 has the shapes (2, 6, 18, 18) and (2, 6, 21, 21)")


# Checkpoints


def test_a_checkpoint_without_checksums_loads_and_says_so(tmp_path, caplog):
    content = torch.load(DIGITS, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / "ckpt.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(tmp_path / "ckpt.pt").info == load_checkpoint(DIGITS).info
    assert "written without checksums" in caplog.text


def test_samples_that_fill_memory_need_their_shape_named(tmp_path):
    content = torch.load(DIGITS, weights_only=True)
    torch.save({**content, "input_shape": [1, 3_000, 3_000]}, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match=r"takes 36,000,000 bytes.*add --input-shape 1,3000,3000"):
        load_checkpoint(tmp_path / "ckpt.pt")
    with pytest.raises(UsageError, match="says that its samples are 1x3000x3000"):
        load_checkpoint(tmp_path / "ckpt.pt", ReadOptions(input_shape=(1, 8, 8)))


def test_a_shape_that_the_network_does_not_take_is_refused(tmp_path):
    content = torch.load(DIGITS, weights_only=True)
    torch.save({**content, "input_shape": [3, 8, 8]}, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="takes no samples of 3x8x8"):
        load_checkpoint(tmp_path / "ckpt.pt")


def test_what_could_not_be_read_again_is_not_written(tmp_path, digits):
    info = CheckpointInfo("resnet8", {}, (1, 8, 8), (1, 2), digits.info.scheme, class_names=(None,))
    with pytest.raises(InputError, match="class_names is None"):
        save_checkpoint(tmp_path / "ckpt.pt", digits.module, info)
    assert not list(tmp_path.iterdir())


# Manifests, samples


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("checkpoint", 1.5), ("checkpoint", "a" * 300), ("checkpoint", "\0"), ("widths", [True]), ("options", [1])),
        *(("options", {"act_bits": 8}), ("input_shape", [0]), ("artifacts", {}), ("bias_correction", "no"), ("x", 1)),
    ],
)
def test_a_manifest_with_an_odd_value_is_refused(tmp_path, key, value):
    content = json.loads((DATA / "v0.1/tqexport.json").read_text())
    (tmp_path / "tqexport.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(InputError, match="is damaged; export again"):
        read_manifest(tmp_path)


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def bomb():
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("inputs.npy", "w") as part,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (1_100_000, 1, 8, 8)}
        np.lib.format.write_array_header_1_0(part, header)
        for _ in range(270):
            part.write(bytes(1 << 20))
    return stream.getvalue()


ZEROS = np.zeros((3, 1, 8, 8), np.float32)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(bomb, id="a bomb"),
        pytest.param(lambda: npz(inputs=ZEROS.astype(np.complex64)), id="complex inputs"),
        pytest.param(lambda: npz(inputs=ZEROS, labels=np.array([0, 10, 1])), id="a label beyond the classes"),
        pytest.param(lambda: npz(inputs=ZEROS, labels=np.array([0.5, 1, 1])), id="half a label"),
        pytest.param(lambda: npz(inputs=ZEROS, labels=np.array([0, 1, 1], np.complex64)), id="complex labels"),
        pytest.param(lambda: npz(inputs=np.full_like(ZEROS, 1e300, np.float64)), id="beyond float32"),
    ],
)
def test_samples_that_are_none_are_refused(tmp_path, content):
    path = tmp_path / "samples.npz"
    path.write_bytes(content())
    with pytest.raises(InputError):
        read_samples(path, [InputInfo("input", (1, 8, 8))], [str(number) for number in range(10)])


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "net.onnx")
    with pytest.raises(InputError, match="no ordinary file"):
        read_bytes(tmp_path / "net.onnx")
