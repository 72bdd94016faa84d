"""Checkpoint files: the native one, which says for itself what it is, and those of the research family."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tqexport.checkpoints.options import BatchNormKey, ReadOptions
from tqexport.checkpoints.research import FAMILY_DEFAULTS, read_research
from tqexport.checkpoints.safe_file import Codes, is_safetensors, read_safetensors, safetensors_bytes
from tqexport.checkpoints.tensor_file import checked_state_dict, read_tensor_file
from tqexport.errors import InputError, TqExportError, UsageError, about, first_line, said_in_a_line
from tqexport.facts import normalization_of, scheme_of
from tqexport.files import sha256_of, write_bytes
from tqexport.integer.grids import attach_grids, grids_of
from tqexport.integer.training import finished
from tqexport.model import DTYPES, ONLY_INPUT, CheckpointInfo, InputInfo, TruncModel
from tqexport.networks.registry import ARCHITECTURES, find_factory
from tqexport.outputs import zeros_for
from tqexport.reading import limits, records
from tqexport.training.layers import switchable_batch_norms
from tqexport.training.quantizers import quantized_weights, set_quantizer, unwrapped
from tqexport.training.ranges import check_ranges
from tqexport.truncation import FLOAT_BITS, STORED_BITS, WIDTHS, Scheme, check_weight, settle, store

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT = "tqexport"
FORMAT_VERSION = 1
SAFETENSORS = ".safetensors"


def save_checkpoint(path: str | Path, module: nn.Module, info: CheckpointInfo) -> None:
    """Write a native checkpoint, which says for itself what it is.

    ``NAME.safetensors`` becomes a file without pickle that holds the codes besides the float weights; every other name
    a PyTorch file, which loads with ``weights_only=True``. A network that has grids is written as integers run it, see
    :func:`tqexport.integer.training.finished`.

    Args:
        path: The file to write; replaced as a whole or not at all.
        module: The network, as ``info.architecture(**info.arguments)`` builds it; it is not changed.
        info: Its description; the names of its grids are added.

    Raises:
        UsageError: A layer was trained with another quantiser than ``info`` says, or grids at other widths; or the
            description holds what safetensors cannot.
        InputError: A grid was not found yet, a learned range came to nothing, or the description holds values of other
            types than it is to have; or safetensors is to hold the codes of a layer that has none.
        ConversionError: The network has grids, and an operation that has no integer form.
    """
    module = unwrapped(module)  # whose keys the architecture's network has
    for weight in quantized_weights(module).values():
        if weight.scheme != info.scheme:
            raise UsageError(
                f"layer {weight.layer} was trained with {weight.scheme}, the description says {info.scheme}"
            )
    check_ranges(module)
    module, info = finished(module, info)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **asdict(info),
        "inputs": [asdict(each) for each in info.signature],
        "arguments": dict(info.arguments),
        "quantized": list(quantized_weights(module)),
    }
    _native_info(content)  # what could not be read again is not written
    if Path(path).suffix == SAFETENSORS:
        write_bytes(Path(path), safetensors_bytes(content, module.state_dict(), _codes(module, info)))
        return
    stream = io.BytesIO()  # a full disk is an OSError when the bytes are written, not whatever torch makes of it
    torch.save({**content, "state_dict": module.state_dict()}, stream)
    write_bytes(Path(path), stream.getvalue())


def load_checkpoint(path: str | Path, options: ReadOptions = ReadOptions()) -> TruncModel:
    """Read a checkpoint into a network ready to run and to export.

    Args:
        path: A file written by :func:`save_checkpoint`, or one of the research family.
        options: What the file does not say.

    Raises:
        InputError: The file is missing, empty, truncated, unsafe, of another format, or does not fit its network.
        UsageError: The architecture is unknown, or an option contradicts the file.
    """
    path = Path(path)
    sha256 = sha256_of(path) if path.is_file() else None
    codes: Codes | None = None
    if is_safetensors(path):
        content, codes = read_safetensors(path)
    else:
        content = read_tensor_file(path)
    if sha256_of(path) != sha256:
        raise InputError(f"{path} changed while it was read; run this again")
    assumed: tuple[str, ...] = ()
    if content.get("format") == FORMAT:
        info = _read_native(path, content, options)
        state_dict = checked_state_dict(path, content.get("state_dict"))
    else:
        info, state_dict = read_research(path, content, options)
        assumed = tuple(
            f"{name.replace('_', ' ')} {default}"
            for name, default in FAMILY_DEFAULTS.items()
            if name not in options.given()
        )
    _check_cost(path, info, options)
    module = _build(path, info)
    _load_state(path, module, state_dict)
    _check_quantized(path, module, content.get("quantized"))
    set_quantizer(module, info.scheme)
    _check(path, module, info)
    if codes is not None:
        _settle(path, module, codes)
    if info.architecture in ARCHITECTURES:  # a network of the user's own is run when it is needed
        _check_runs(path, module, info)
    return TruncModel(module.eval(), info, sha256, assumed)


def _codes(module: nn.Module, info: CheckpointInfo) -> Codes:
    """The codes of every quantised weight, by name and width; one width is enough where others are shifted from it."""
    widths = (STORED_BITS,) if info.scheme.quantizer == "truncquant" else info.widths
    weights = quantized_weights(module)
    for weight in weights.values():
        check_weight(weight.layer, weight.original)
    plain = Scheme(info.scheme.quantizer)  # codes depend on no other option
    return {
        name: {bits: store(weight.original, bits, plain).codes for bits in widths} for name, weight in weights.items()
    }


def _settle(path: Path, module: nn.Module, codes: Codes) -> None:
    """Let the stored codes decide where this machine's tanh gives a weight on a boundary another one."""
    for name, weight in quantized_weights(module).items():
        with about(f"{path} is damaged: layer {weight.layer}:"):
            if any(stored.shape != weight.original.shape for stored in codes[name].values()):
                raise InputError("its codes have another shape than its float weights")
            weight.original.data = settle(weight.original.data, codes[name], weight.scheme.quantizer)


def _read_native(path: Path, content: Mapping[str, Any], options: ReadOptions) -> CheckpointInfo:
    """What a native checkpoint says of itself."""
    with about(f"{path}:"):
        version = records.whole(content.get("format_version"), "format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has checkpoint format {version}, this tqexport reads {FORMAT_VERSION}; update tqexport"
        )
    if refused := sorted(set(options.given()) - {"model", "input_shape"}):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in refused)
        raise UsageError(f"{path} says for itself how it was trained; {names} is for files that do not")
    named = str(content.get("architecture"))
    if not options.model and named not in ARCHITECTURES:
        if ":" in named:  # importing what a file names would run whatever it likes
            raise UsageError(
                f"{path} is built by {named}, which runs code of its own; if you trust it, add --model {named}"
            )
        find_factory(named)
    with about(f"{path} is a damaged tqexport checkpoint:"):
        info = _native_info(content)
    if options.input_shape not in (None, info.signature[0].shape):
        raise UsageError(f"{path} says that its samples are {_by(info.signature[0].shape)}; leave --input-shape out")
    return replace(info, architecture=options.model or info.architecture)


def _native_info(content: Mapping[str, Any]) -> CheckpointInfo:
    """The description that the entries of a native checkpoint give.

    Raises:
        InputError: One is missing, or of another type than it is written as.
    """
    content = {"grids": (), **content}  # files of version 0.1 say nothing of grids
    if "inputs" not in content and "input_shape" in content:  # and have one input
        shape = records.shape(content["input_shape"], "input_shape")
        content["inputs"] = [{"name": ONLY_INPUT, "shape": shape, "dtype": "float32", "below": None}]
    if missing := [item.name for item in fields(CheckpointInfo) if item.name not in content]:
        raise InputError(f"it has no {missing[0]}")
    inputs = content["inputs"]
    if not isinstance(inputs, (list, tuple)) or not 0 < len(inputs) <= limits.INPUTS:
        raise InputError(f"inputs are no list of 1 to {limits.INPUTS}")
    widths = records.wholes(content["widths"], "widths", WIDTHS)
    activation_bits = records.wholes(content["activation_bits"], "activation_bits", {*WIDTHS, FLOAT_BITS})
    if not widths or len({*widths}) != len(widths) or len(activation_bits) not in (0, len(widths)):
        raise InputError(f"its widths are {widths} with activation widths {activation_bits}")
    batch_norm_key: Any = records.one_of(content["batch_norm_key"], "batch_norm_key", get_args(BatchNormKey))
    return CheckpointInfo(
        architecture=records.text(content["architecture"], "architecture"),
        arguments=records.plain(content["arguments"], "arguments"),
        inputs=tuple(_input(records.mapping(entry, "an input")) for entry in inputs),
        widths=widths,
        scheme=scheme_of(content["scheme"]),
        activation_bits=activation_bits,
        batch_norm_key=batch_norm_key,
        normalization=None if content["normalization"] is None else normalization_of(content["normalization"]),
        class_names=records.names(content["class_names"], "class_names"),
        grids=records.texts(content["grids"], "grids"),
    )


def _input(entry: Mapping[str, Any]) -> InputInfo:
    """One input of the network."""
    below = entry.get("below")
    shape = entry.get("shape")
    try:
        return InputInfo(
            records.text(entry.get("name"), "the name of an input"),
            records.shape(shape, "the shape of an input") if shape not in ([], ()) else (),
            records.one_of(entry.get("dtype"), "the type of an input", DTYPES),
            None if below is None else records.whole(below, "the limit of an input", low=1),
            _dynamic(entry.get("dynamic", ())),  # which files of before 0.2 do not have
        )
    except UsageError as error:
        raise InputError(str(error)) from error


def _dynamic(pairs: Any) -> dict[int, str]:
    """The names of the sizes of an input that are free, by axis."""
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    ):
        raise InputError("the dynamic axes of an input are no list of pairs")
    what = "a dynamic axis of an input"
    return {records.whole(axis, what, high=limits.DIMENSIONS): records.text(name, what) for axis, name in pairs}


def _check_cost(path: Path, info: CheckpointInfo, options: ReadOptions) -> None:
    """Refuse samples that nobody's memory bears, unless the user names the shape of the first input."""
    elements = sum(math.prod(each.shape) for each in info.signature)
    if elements > limits.SAMPLE_ELEMENTS and options.input_shape is None:
        shapes = " and ".join(_by(each.shape) for each in info.signature)
        raise InputError(
            f"{path}: a sample of {shapes} takes {4 * elements:,} bytes, and what the network makes of it some hundred "
            f"times that; if this is what you want, add --input-shape {','.join(map(str, info.signature[0].shape))}"
        )


def _by(shape: Sequence[int]) -> str:
    """A shape in words."""
    return "x".join(map(str, shape))


def _build(path: Path, info: CheckpointInfo) -> nn.Module:
    """The network that a checkpoint describes, without its values."""
    factory = find_factory(info.architecture)
    # Without memory until the shapes are known to fit the file; a factory of the user's may need real tensors.
    device = "meta" if info.architecture in ARCHITECTURES else "cpu"
    try:
        with torch.device(device):
            module = factory(**info.arguments)
    except TqExportError:
        raise
    except Exception as error:  # a factory may be the user's own code: whatever it raises is about this file
        raise InputError(f"{path}: building {info.architecture} failed: {said_in_a_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{path}: {info.architecture} returned a {type(module).__name__}, not an nn.Module")
    built = grids_of(module)
    if built is None and info.grids:
        with torch.device(device):
            attach_grids(module, info.grids, info.widths)
    elif built is not None and (built.names, built.widths) != (info.grids, info.widths):
        raise InputError(
            f"{path} has grids for {_grids_of(info.grids, info.widths)}, and the network that {info.architecture} "
            f"builds has them for {_grids_of(built.names, built.widths)}; build it as it was trained"
        )
    return module


def _check_runs(path: Path, module: nn.Module, info: CheckpointInfo) -> None:
    """Refuse a network that takes no samples of the shape that is said."""
    try:
        with torch.no_grad():
            module.eval()(*zeros_for(info.signature, 1))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shapes = " and ".join(_by(each.shape) for each in info.signature)
        raise InputError(
            f"{path}: {info.architecture} takes no samples of {shapes} ({first_line(error)}); "
            "name their shape with --input-shape where the file does not say it"
        ) from error


def _grids_of(names: Sequence[str], widths: Sequence[int]) -> str:
    """For people: which values have grids, at which widths."""
    return f"{', '.join(names)} at {', '.join(map(str, widths))} bits" if names else "nothing"


def _check_quantized(path: Path, module: nn.Module, trained: Any) -> None:
    """Refuse a network that quantises other weights than the file's did; files of version 0.1 do not say which."""
    if not isinstance(trained, list):
        return
    built = quantized_weights(module)
    for name in sorted({*map(str, trained)} ^ {*built}):
        how, now = ("float", "quantised") if name in built else ("quantised", "float")
        raise InputError(
            f"{path}: {name} was trained {how}, and the network that its architecture builds has it {now}; "
            "build it as it was trained, e.g. with float_layers of tqexport.prepare"
        )


def _load_state(path: Path, module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the values into the network, all of them or, if one does not fit, none."""
    wanted = module.state_dict()
    problems = [f"missing {key}" for key in wanted if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in wanted]
    problems += [
        f"{key} is {tuple(state_dict[key].shape)}, not {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    problems += [
        f"{key} holds other numbers than {value.dtype} has"
        for key, value in wanted.items()
        if key in state_dict
        and value.dtype == torch.uint8
        and bool((state_dict[key].to(value.dtype) != state_dict[key]).any())
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InputError(f"{path} does not fit its architecture: {shown}")
    fitting = {key: state_dict[key].to(value.dtype).contiguous() for key, value in wanted.items()}
    module.load_state_dict(fitting, assign=True)


def _check(path: Path, module: nn.Module, info: CheckpointInfo) -> None:
    """Refuse a network whose codes would be undefined, that diverged, or that lacks a BatchNorm for a width."""
    weights = quantized_weights(module)
    if not weights:
        raise InputError(f"{path}: {info.architecture} has no quantised layer; pass it through tqexport.prepare")
    for weight in weights.values():
        with about(f"{path}:"):
            check_weight(weight.layer, weight.original)
    if (grids := grids_of(module)) is not None:
        with about(f"{path}:"):
            for bits in info.widths:
                grids.at(bits)  # which refuses damaged ones
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"{path}: {key} holds NaN or infinite values; the training diverged")
    with about(f"{path}:"):
        check_ranges(module)
    for name, norm in switchable_batch_norms(module).items():
        if missing := sorted({info.batch_norm_width(bits) for bits in info.widths} - set(norm.widths)):
            raise InputError(f"{path}: {name} has no BatchNorm for {missing} bits, which its widths need")
