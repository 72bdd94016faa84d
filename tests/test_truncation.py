"""The arithmetic: shifting equals quantising, and every form of a weight is the same weight."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tqexport.errors import InputError, UsageError
from tqexport.truncation import (
    WIDTHS,
    Scheme,
    affine,
    check_shiftable,
    check_weight,
    codes_of_integers,
    direct_codes,
    full_precision,
    integer_codes,
    max_code,
    normalize,
    quantize_activation,
    store,
    truncate,
)

unit_floats = st.floats(0, 1, width=32)
weights = hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=5), elements=st.floats(-8, 8, width=32))


@given(unit_floats)
def test_the_shift_equals_the_direct_quantiser(x):
    x = torch.tensor([x])
    stored = direct_codes(x, 8).byte()
    for bits in WIDTHS:
        assert torch.equal(truncate(stored, bits).float(), direct_codes(x, bits))


def test_the_shift_equals_the_direct_quantiser_next_to_every_boundary():
    edges = torch.arange(257, dtype=torch.float32) / 256
    below, above = (torch.nextafter(edges, torch.tensor(end)) for end in (0.0, 1.0))
    x = torch.cat([below, edges, above]).clamp(0, 1)
    stored = direct_codes(x, 8).byte()
    for bits in WIDTHS:
        assert torch.equal(truncate(stored, bits).float(), direct_codes(x, bits))


def test_the_largest_weight_does_not_overflow():
    assert direct_codes(torch.tensor([1.0]), 8).byte().item() == 255
    assert [direct_codes(torch.tensor([1.0]), bits).item() for bits in WIDTHS] == [max_code(b) for b in WIDTHS]


def test_rounded_codes_may_not_be_shifted():
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    shifted = truncate(direct_codes(x, 8, "dorefa").byte(), 2)
    assert (shifted.float() != direct_codes(x, 2, "dorefa")).float().mean() > 0.1


@given(weights)
def test_stored_weights_are_the_papers(w):
    weight = torch.from_numpy(w)
    if not weight.tanh().any():
        return
    magnitude = weight.abs().mean()
    for bits in WIDTHS:
        stored = store(weight, bits)
        unit = direct_codes(normalize(weight), bits) / max_code(bits)
        expected = magnitude * (2 * unit - 1)
        got = (stored.codes >> stored.shift).double() * stored.affine.scale + stored.affine.offset
        assert stored.codes.dtype == torch.uint8
        assert torch.allclose(got.float(), expected, rtol=0, atol=float(magnitude) * 1e-6 + 1e-45)


@pytest.mark.parametrize("quantizer", ["truncquant", "dorefa"])
def test_weights_below_the_normal_numbers_have_codes(quantizer):
    """-199 of the smallest float32: half of it is -100 of them, so that ``x`` is below 0."""
    weight = torch.tensor([-2.79e-43])
    assert normalize(weight) < 0
    assert all(direct_codes(normalize(weight), bits, quantizer) == 0 for bits in WIDTHS)


def test_the_codes_of_a_layer_are_the_same_at_every_width():
    weight = torch.randn(3, 4, 5, 2)
    assert all(torch.equal(store(weight, bits).codes, store(weight, 8).codes) for bits in WIDTHS)
    assert [store(weight, bits).shift for bits in WIDTHS] == [7, 6, 5, 4, 3, 2, 1, 0]


def test_the_stored_form_does_not_depend_on_the_number_of_threads():
    weight = torch.randn(256, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    forms = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        forms.append((store(weight, 4).affine, store(weight, 4, Scheme(bias_correction=True)).affine))
    torch.set_num_threads(threads)
    scales = [[np.float32(value) for pair in form for value in (pair.scale, pair.offset)] for form in forms]
    assert scales[0] == scales[1] == scales[2]


@pytest.mark.parametrize("bits", WIDTHS)
def test_dorefa_rounds_to_the_nearest_code_of_each_width(bits):
    weight = torch.randn(64, 9)
    stored = store(weight, bits, Scheme("dorefa"))
    squashed = np.tanh(weight.numpy().astype(np.float64))
    exact = max_code(bits) * (squashed / 2 / np.abs(squashed).max() + 0.5)
    assert stored.shift == 0
    assert np.abs(stored.codes.numpy() - exact).max() <= 0.5 + 1e-4  # tanh in float32
    assert stored.affine == affine(weight, stored.codes, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_bias_correction_gives_the_deviation_of_tanh_and_its_mean_times_the_stretch(bits):
    weight = torch.randn(32, 16, 3, 3) * 0.4 + 0.1
    stored = store(weight, bits, Scheme(bias_correction=True))
    corrected = (stored.codes >> stored.shift).double() * stored.affine.scale + stored.affine.offset
    squashed = weight.tanh().double()
    base = (stored.codes >> stored.shift).double() * affine(weight, stored.codes, bits).scale
    stretch = (squashed - squashed.mean()).norm() / (base - base.mean()).norm()
    assert torch.allclose((corrected - corrected.mean()).norm(), (squashed - squashed.mean()).norm())
    assert torch.allclose(corrected.mean(), squashed.mean() * stretch)


def test_bias_correction_of_equal_codes_is_refused():
    with pytest.raises(InputError, match="every code of the layer is the same"):
        store(torch.tensor([0.5, 0.6, 0.7]), 1, Scheme(bias_correction=True))


def test_full_precision_is_not_the_raw_weight():
    weight = torch.tensor([0.5, -1.0])
    expected = 0.75 * weight.tanh() / weight.tanh().abs().max()
    assert torch.allclose(full_precision(weight), expected)


def test_activations_round_half_to_even_and_clamp():
    x = torch.tensor([-1.0, 0.5 / 3, 1.5 / 3, 2.5 / 3, 7.0])
    assert torch.equal((quantize_activation(x, 2) * 3).round(), torch.tensor([0.0, 0.0, 2.0, 2.0, 3.0]))
    assert torch.equal(quantize_activation(x, 32), x.relu())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3, 3), "layer conv is all zeros"),
        (torch.tensor([1.0, torch.nan]), "layer conv holds NaN"),
        (torch.tensor([1.0, torch.inf]), "layer conv holds NaN or infinite"),
    ],
)
def test_undefined_layers_are_refused_by_name(weight, message):
    with pytest.raises(InputError, match=message):
        check_weight("conv", weight)


@pytest.mark.parametrize("bits", WIDTHS)
def test_integers_times_a_scale_are_the_weights(bits):
    """In the units of E: ``2 u_b / M_b - 1``, by one multiplication; at 8 bits half a step is left."""
    codes = np.arange(max_code(bits) + 1, dtype=np.uint8)
    integers = integer_codes(codes, bits)
    assert integers.dtype == np.int8
    scale, constant = (2 / 255, 0.5) if bits == 8 else (1 / max_code(bits), 0.0)
    weights = (integers.astype(np.float64) + constant) * scale
    assert np.allclose(weights, 2 * codes.astype(np.float64) / max_code(bits) - 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", WIDTHS)
def test_integers_lead_back_to_their_codes_and_others_to_none(bits):
    codes = np.arange(max_code(bits) + 1, dtype=np.uint8).reshape(-1, 2)
    integers = integer_codes(codes, bits)
    assert np.array_equal(codes_of_integers(integers, bits), codes)
    others = np.setdiff1d(np.arange(-128, 128), integers)
    assert len(others) == 256 - codes.size
    assert (codes_of_integers(others.astype(np.int8), bits) == -1).all()
    between = np.array([-300.0, 0.25, 300.0], np.float32)  # what a float16 filter of a damaged file may hold
    assert (codes_of_integers(between, bits) == -1).all()


@pytest.mark.parametrize(
    ("widths", "quantizer", "error", "message"),
    [
        ((2, 8), "dorefa", InputError, "dorefa cannot switch to other widths: its codes must not be shifted"),
        ((8,), "truncquant", UsageError, "at least two widths"),
        ((8, 8), "truncquant", UsageError, "at least two widths"),
        ((), "truncquant", UsageError, "at least two widths"),
    ],
)
def test_what_no_file_with_several_widths_can_hold_is_refused(widths, quantizer, error, message):
    check_shiftable((1, 8), "truncquant")
    with pytest.raises(error, match=message):
        check_shiftable(widths, quantizer)
