"""The arithmetic: shifting equals quantising, and every form of a weight is the same weight."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tqexport.errors import InputError
from tqexport.truncation import (
    WIDTHS,
    Scheme,
    affine,
    check_weight,
    direct_codes,
    full_precision,
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


def test_dorefa_has_codes_of_its_own_at_each_width():
    weight = torch.randn(64, 9)
    for bits in WIDTHS:
        stored = store(weight, bits, Scheme("dorefa"))
        assert stored.shift == 0
        assert int(stored.codes.max()) == max_code(bits) or int(stored.codes.min()) == 0
        assert len(stored.codes.unique()) > max_code(bits) // 4


@pytest.mark.parametrize("bits", WIDTHS)
def test_bias_correction_matches_mean_and_deviation_of_tanh(bits):
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
