"""The arithmetic of TruncQuant, and nothing else.

One float32 weight tensor ``w`` (a whole layer) becomes one unsigned byte per weight, and those bytes shifted right
serve every width from 1 to 8 bits (arXiv 2506.11431)::

    t   = tanh(w)                     E = mean|w|          (raw w, one scalar per layer)
    x   = t / 2 / max|t| + 0.5        in [0, 1]
    u   = min(floor(256 x), 255)      the stored code
    u_b = u >> (8 - b)                the code at b bits; equals min(floor(2^b x), M_b), M_b = 2^b - 1
    w_b = E (2 u_b / M_b - 1)         = scale_b * u_b + offset_b

Everything else in the package calls these functions; the formulas stand nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from tqexport.errors import InputError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

__all__ = [
    "FLOAT_BITS",
    "STORED_BITS",
    "WIDTHS",
    "Affine",
    "Quantizer",
    "Scheme",
    "StoredWeight",
    "affine",
    "check_shiftable",
    "check_weight",
    "codes_of_integers",
    "direct_codes",
    "full_precision",
    "integer_codes",
    "magnitude",
    "max_code",
    "normalize",
    "quantize_activation",
    "range_levels",
    "settle",
    "store",
    "truncate",
]

STORED_BITS = 8
"""The width at which codes are stored, and from which they are shifted."""
WIDTHS = tuple(range(1, STORED_BITS + 1))
"""Every width that a stored code can be cut to."""
FLOAT_BITS = 32
"""The full-precision path, which is called 32 bits in the research family."""
Quantizer = Literal["truncquant", "dorefa"]
"""How weights are quantised in training; :class:`Scheme` says what each means."""

_SETTLING_STEPS = 16  # of 2^-24: what tanh (of a weight and of the largest, 3 ulp each) and three roundings take x


@dataclass(frozen=True)
class Scheme:
    """How weights are quantised.

    Attributes:
        quantizer: ``truncquant`` floors, so its codes can be shifted; ``dorefa`` rounds, so its codes cannot.
        bias_correction: Move and stretch each quantised layer by the statistics of ``tanh(w)``: its standard deviation
            becomes that of ``tanh(w)``, and its mean that of ``tanh(w)`` times the factor of the stretch.
        power_of_two_scale: Round each layer's ``E`` to the nearest power of two (on a logarithmic scale), so that
            hardware without multipliers applies it with a shift.

    Raises:
        UsageError: There is no such quantiser, or both options are on: bias correction sets a scale of its own.
    """

    quantizer: Quantizer = "truncquant"
    bias_correction: bool = False
    power_of_two_scale: bool = False

    def __post_init__(self) -> None:
        if self.quantizer not in get_args(Quantizer):
            raise UsageError(f"there is no quantizer {self.quantizer!r}; choose {' or '.join(get_args(Quantizer))}")
        if self.bias_correction and self.power_of_two_scale:
            raise UsageError("bias correction sets a scale of its own; leave it off for power-of-two scales")


@dataclass(frozen=True)
class Affine:
    """``weight = scale * code + offset``, one pair per layer and width."""

    scale: float
    offset: float


@dataclass(frozen=True)
class StoredWeight:
    """One layer as a file stores it at one width.

    Attributes:
        codes: uint8, the shape of the weight. The same tensor at every width for ``truncquant``.
        shift: How far right the codes are shifted to reach the width.
        affine: Turns the shifted codes into weights.
    """

    codes: Tensor
    shift: int
    affine: Affine


def max_code(bits: int) -> int:
    """``M_b = 2^b - 1``, the largest code at ``bits`` bits; de-quantisation divides by it."""
    return (1 << bits) - 1


def normalize(weight: Tensor) -> Tensor:
    """Map a float32 weight to ``x = tanh(w) / 2 / max|tanh(w)| + 0.5`` in [0, 1], same shape."""
    squashed = weight.tanh()
    return squashed / 2 / squashed.abs().max() + 0.5


def direct_codes(x: Tensor, bits: int, quantizer: Quantizer = "truncquant") -> Tensor:
    """Quantise normalised weights straight to ``bits`` bits, as training does.

    Args:
        x: float32 in [0, 1], any shape (see :func:`normalize`).
        bits: 1 to 8.
        quantizer: ``truncquant``: ``min(floor(2^b x), M_b)``; ``dorefa``: ``round_half_even(M_b x)``.

    Returns:
        float32 tensor of whole numbers 0 to ``M_b``, the shape of ``x``.
    """
    # Weights below float32's normal numbers lose so much in their halves that ``x`` may be below 0.
    if quantizer == "dorefa":
        return (x * max_code(bits)).round().clamp(0, max_code(bits))
    return (x * (1 << bits)).floor().clamp(0, max_code(bits))


def truncate(codes: Tensor, bits: int) -> Tensor:
    """Cut stored uint8 codes to ``bits`` bits: ``u >> (8 - bits)``, uint8, same shape."""
    return codes >> (STORED_BITS - bits)


def integer_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int8]:
    """The int8 integer that stands for a code where integers multiply: ``2 u_b - M_b`` below 8 bits, ``u - 128`` at 8.

    Args:
        codes: uint8 codes at ``bits`` bits, any shape.
        bits: 1 to 8.

    Returns:
        int8, the shape of ``codes``. The weight is ``E / M_b`` times it below 8 bits, ``2 E / 255`` times it and a half
        at 8.
    """
    wide = codes.astype("int16")
    return (wide - 128 if bits == STORED_BITS else 2 * wide - max_code(bits)).astype("int8")


def codes_of_integers(integers: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int16]:
    """The inverse of :func:`integer_codes`; int16, -1 for integers that stand for no code."""
    wide = integers.astype("int16")
    middle, step = (128, 1) if bits == STORED_BITS else (max_code(bits), 2)
    codes = (wide + middle) // step
    codes[(codes * step - middle != integers) | (codes < 0) | (codes > max_code(bits))] = -1
    return codes


def magnitude(weight: Tensor, scheme: Scheme = Scheme()) -> Tensor:
    """``E = mean|w|`` of one layer, or the power of two nearest to it; a scalar of its dtype, without gradient."""
    if not scheme.power_of_two_scale:
        return weight.detach().abs().mean()
    # In float64, so that training and export cannot round to different powers.
    return weight.detach().double().abs().mean().log2().round().exp2().to(weight.dtype)


def full_precision(weight: Tensor, scheme: Scheme = Scheme()) -> Tensor:
    """The family's 32-bit path, ``E * tanh(w) / max|tanh(w)|`` (not the raw weight)."""
    squashed = weight.tanh()
    return magnitude(weight, scheme) * squashed / squashed.abs().max()


def affine(weight: Tensor, codes: Tensor, bits: int, scheme: Scheme = Scheme()) -> Affine:
    """Scale and offset that turn codes at ``bits`` bits into weights.

    Without bias correction ``scale = 2E / M_b`` and ``offset = -E``. With it, ``base = scale * codes + offset`` is
    first moved to the mean of ``tanh(w)`` and then stretched to its standard deviation, both as a whole:
    ``stretch * (base + mean(tanh(w)) - mean(base))``, which is affine again. So the standard deviation becomes that of
    ``tanh(w)``, but the mean becomes ``stretch * mean(tanh(w))``: the stretch applies to the mean, too.

    Args:
        weight: float32, the raw weight.
        codes: The codes at this width (already shifted), any dtype, the shape of ``weight``.
        bits: 1 to 8.
        scheme: Its options; the quantiser itself plays no part.

    Raises:
        InputError: All codes are equal, so that bias correction would divide by zero.
    """
    size = float(magnitude(weight.double(), scheme))  # a float32 sum would depend on the number of threads
    scale, offset = 2 * size / max_code(bits), -size
    if not scheme.bias_correction:
        return Affine(scale, offset)
    squashed = weight.tanh().double()
    base = codes.double() * scale + offset
    spread = float((base - base.mean()).norm())
    if spread == 0:
        raise InputError(f"bias correction is undefined at {bits} bits: every code of the layer is the same")
    stretch = float((squashed - squashed.mean()).norm()) / spread
    return Affine(scale * stretch, (offset + float(squashed.mean() - base.mean())) * stretch)


def store(weight: Tensor, bits: int, scheme: Scheme = Scheme()) -> StoredWeight:
    """The stored form of one layer at one width.

    Args:
        weight: float32, finite, not all zero (see :func:`check_weight`).
        bits: 1 to 8.
        scheme: ``truncquant`` stores the 8-bit codes and a shift; ``dorefa`` codes must not be shifted, so each width
            has codes of its own and a shift of 0.
    """
    x = normalize(weight.detach())
    if scheme.quantizer == "dorefa":
        codes, shift = direct_codes(x, bits, "dorefa").byte(), 0
    else:
        codes, shift = direct_codes(x, STORED_BITS).byte(), STORED_BITS - bits
    return StoredWeight(codes, shift, affine(weight.detach(), codes >> shift, bits, scheme))


def settle(weight: Tensor, codes: Mapping[int, Tensor], quantizer: Quantizer = "truncquant") -> Tensor:
    """The weights with those moved that this machine would give other codes than the machine that stored them.

    Two right implementations of tanh differ in the last bits, so that a weight on the boundary of two codes may fall to
    either side. Such a weight is moved over the boundary, by steps of 2^-24 of ``x``, as few as it takes, at most 16.

    Args:
        weight: float32, see :func:`check_weight`.
        codes: By width, the stored codes, uint8 in the shape of ``weight``.
        quantizer: The quantiser.

    Returns:
        float32 weights whose codes are ``codes`` on this machine; ``weight`` itself where they are already.

    Raises:
        InputError: A code differs by more than that explains.
    """
    import torch  # applications cut widths out of files without it

    settled = weight
    for step in range(_SETTLING_STEPS + 1):
        x = normalize(settled)
        wrong = torch.stack([stored.int() - direct_codes(x, bits, quantizer).int() for bits, stored in codes.items()])
        if not bool(wrong.any()):
            return settled
        if step == 0:
            exact = weight.double()
            squashed = exact.tanh()
            per_x = 2 * squashed.abs().max() / (1 - squashed.square())  # how fast w changes with x
        towards = wrong.sum(0).sign()
        settled = (exact + towards * (step + 1) * 2.0**-24 * per_x).float().where(towards != 0, settled)
    differ = int(wrong.any(0).sum())
    raise InputError(f"{differ:,} of its {weight.numel():,} codes are not those of its float weights")


def quantize_activation(x: Tensor, bits: int) -> Tensor:
    """``round_half_even(clamp(x, 0, 1) * M_a) / M_a``; a plain ReLU at 32 bits. float32, same shape."""
    if bits == FLOAT_BITS:
        return x.relu()
    return (x.clamp(0, 1) * max_code(bits)).round() / max_code(bits)


def range_levels(bits: int, *, signed: bool) -> tuple[int, int, int]:
    """The levels ``k`` of an activation whose range ``r`` is learned; a level stands for ``k r / n``.

    An unsigned one has the levels of :func:`quantize_activation`, ``0 … M_a``, and ``n = M_a``. A signed one has
    ``-2^(a - 1) … 2^(a - 1) - 1`` and ``n = 2^(a - 1)``: 0 is a level of every width, and a step at ``a`` bits is
    ``2^(8 - a)`` steps at 8 bits, which is what a right shift of its codes leaves. At 1 bit, where that would leave no
    positive number, it has the two levels of 2 bits that are not negative, ``0 … 1`` with ``n = 2``.

    Args:
        bits: 1 to 8.
        signed: Whether there are negative levels.

    Returns:
        The lowest and the highest level, and ``n``.
    """
    if not signed:
        return 0, max_code(bits), max_code(bits)
    if bits == 1:
        return 0, 1, 2
    half = 1 << (bits - 1)
    return -half, half - 1, half


def check_shiftable(widths: Sequence[int], quantizer: str) -> None:
    """Refuse, before any slow work, what no file with several widths can hold.

    Raises:
        UsageError: Fewer than two widths.
        InputError: The codes of the quantiser may not be shifted.
    """
    if quantizer != "truncquant":
        raise InputError(
            f"one file of a network trained with {quantizer} cannot switch to other widths: its codes must not be "
            "shifted, so every width has codes of its own; export each width as a file of its own"
        )
    if len(set(widths)) < 2:
        raise UsageError("a file that gives several widths needs at least two widths")


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse a layer whose codes would be undefined.

    Raises:
        InputError: ``weight`` holds NaN or infinity, or nothing but zeros.
    """
    if not bool(weight.isfinite().all()):
        raise InputError(f"layer {name} holds NaN or infinite weights; it cannot be quantised")
    if not bool(weight.any()):
        raise InputError(f"layer {name} is all zeros, so its codes are undefined (0/0); train it or keep it float")
