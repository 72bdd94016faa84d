"""Checkpoint files: the native one, which says for itself what it is, and those of the research family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tqexport.checkpoints.options import BatchNormKey, ReadOptions
from tqexport.checkpoints.research import FAMILY_DEFAULTS, read_research
from tqexport.checkpoints.tensor_file import checked_state_dict, read_tensor_file
from tqexport.errors import InputError, TqExportError, UsageError, about
from tqexport.facts import normalization_of, scheme_of
from tqexport.files import atomic_path, sha256_of
from tqexport.integer.grids import attach_grids, grids_of
from tqexport.integer.training import finished
from tqexport.model import CheckpointInfo, TruncModel
from tqexport.networks.registry import ARCHITECTURES, find_factory
from tqexport.reading import limits, records
from tqexport.training.layers import switchable_batch_norms
from tqexport.training.quantizers import quantized_weights, set_quantizer
from tqexport.truncation import FLOAT_BITS, WIDTHS, check_weight

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT = "tqexport"
FORMAT_VERSION = 1


def save_checkpoint(path: str | Path, module: nn.Module, info: CheckpointInfo) -> None:
    """Write a native checkpoint, which says for itself what it is and loads with ``weights_only=True``.

    A network that has grids is written as integers run it, see :func:`tqexport.integer.training.finished`.

    Args:
        path: The file to write; replaced as a whole or not at all.
        module: The network, as ``info.architecture(**info.arguments)`` builds it; it is not changed.
        info: Its description; the names of its grids are added.

    Raises:
        UsageError: A layer was trained with another quantiser than ``info`` says, or grids at other widths.
        InputError: A grid was not found yet, or the description holds values of other types than it is to have.
        ConversionError: The network has grids, and an operation that has no integer form.
    """
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module.module  # the network itself, whose keys the architecture's network has
    for weight in quantized_weights(module).values():
        if weight.scheme != info.scheme:
            raise UsageError(
                f"layer {weight.layer} was trained with {weight.scheme}, the description says {info.scheme}"
            )
    module, info = finished(module, info)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **asdict(info),
        "arguments": dict(info.arguments),
        "quantized": list(quantized_weights(module)),
        "state_dict": module.state_dict(),
    }
    _native_info(content)  # what could not be read again is not written
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as stream:
        torch.save(content, stream)


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
    content = read_tensor_file(path)
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
    if info.architecture in ARCHITECTURES:  # a network of the user's own is run when it is needed
        _check_runs(path, module, info)
    return TruncModel(module.eval(), info, sha256_of(path), assumed)


def _read_native(path: Path, content: Mapping[str, Any], options: ReadOptions) -> CheckpointInfo:
    """What a native checkpoint says of itself."""
    version = content.get("format_version")
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise InputError(
            f"{path} has checkpoint format {version!r}, this tqexport reads {FORMAT_VERSION}; update tqexport"
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
    if options.input_shape not in (None, info.input_shape):
        raise UsageError(f"{path} says that its samples are {_by(info.input_shape)}; leave --input-shape out")
    return replace(info, architecture=options.model or info.architecture)


def _native_info(content: Mapping[str, Any]) -> CheckpointInfo:
    """The description that the entries of a native checkpoint give.

    Raises:
        InputError: One is missing, or of another type than it is written as.
    """
    content = {"grids": (), **content}  # files of version 0.1 say nothing of grids
    if missing := [item.name for item in fields(CheckpointInfo) if item.name not in content]:
        raise InputError(f"it has no {missing[0]}")
    widths = records.wholes(content["widths"], "widths", WIDTHS)
    activation_bits = records.wholes(content["activation_bits"], "activation_bits", {*WIDTHS, FLOAT_BITS})
    if not widths or len({*widths}) != len(widths) or len(activation_bits) not in (0, len(widths)):
        raise InputError(f"its widths are {widths} with activation widths {activation_bits}")
    batch_norm_key: Any = records.one_of(content["batch_norm_key"], "batch_norm_key", get_args(BatchNormKey))
    return CheckpointInfo(
        architecture=records.text(content["architecture"], "architecture"),
        arguments=records.plain(content["arguments"], "arguments"),
        input_shape=records.shape(content["input_shape"], "input_shape"),
        widths=widths,
        scheme=scheme_of(content["scheme"]),
        activation_bits=activation_bits,
        batch_norm_key=batch_norm_key,
        normalization=None if content["normalization"] is None else normalization_of(content["normalization"]),
        class_names=records.names(content["class_names"], "class_names"),
        grids=records.texts(content["grids"], "grids"),
    )


def _check_cost(path: Path, info: CheckpointInfo, options: ReadOptions) -> None:
    """Refuse samples that nobody's memory bears, unless the user names their shape."""
    elements = math.prod(info.input_shape)
    if elements > limits.SAMPLE_ELEMENTS and options.input_shape is None:
        shape = ",".join(map(str, info.input_shape))
        raise InputError(
            f"{path}: a sample of {_by(info.input_shape)} takes {4 * elements:,} bytes, and what the network makes of "
            f"it some hundred times that; if this is what you want, add --input-shape {shape}"
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
        raise InputError(f"{path}: building {info.architecture} failed: {type(error).__name__}: {error}") from error
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
            module.eval()(torch.zeros((1, *info.input_shape)))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{path}: {info.architecture} takes no samples of {_by(info.input_shape)} ({said}); "
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
    for name, norm in switchable_batch_norms(module).items():
        if missing := sorted({info.batch_norm_width(bits) for bits in info.widths} - set(norm.widths)):
            raise InputError(f"{path}: {name} has no BatchNorm for {missing} bits, which its widths need")
