"""What constants are made of, by their numbers."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper, numpy_helper

from tqexport.backends.tflite.fingerprints import Fingerprints, Product, Sum, with_fingerprints

SHAPES = {
    **{"weight": (8, 6), "other": (8, 6), "square": (8, 8), "wide": (6, 8), "conv": (8, 2, 3, 3)},
    **{"gain": (8,), "bias": (8,), "shift": (6,), "table": (1, 5, 4), "places": (1, 5, 4), "pair": (2,)},
    **{"act.levels": (), "last.levels": ()},
}
THIRD = 1 / np.sqrt(np.float32(3))


def drawn(seed):
    random = np.random.default_rng(seed)
    values = {name: random.random(shape, np.float32) + np.float32(0.5) for name, shape in SHAPES.items()}
    return {name: value * (2**20 if name.endswith(".levels") else 1) for name, value in values.items()}


VALUES, OTHERS = drawn(0), drawn(1)


@pytest.fixture(scope="module")
def fingerprints():
    parameters = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in VALUES.items()]
    constants = [
        numpy_helper.from_array(np.float32(value), f"constant/{i}") for i, value in enumerate((np.sqrt(3), 1e-6))
    ]
    node = helper.make_node("HardSigmoid", ["x"], ["y"], alpha=1 / 6, beta=0.5)
    graph = helper.make_graph([node], "", [], [], [*parameters, *constants])
    return Fingerprints(helper.make_model(graph))


@pytest.mark.parametrize("make", [
    lambda v: v["weight"],
    lambda v: v["weight"] / v["act.levels"],
    lambda v: v["weight"] * THIRD,
    lambda v: v["weight"] * np.float32(1 / 49),
    lambda v: v["weight"] * v["gain"][:, None],
    lambda v: v["weight"] * v["gain"][:, None] * np.float32(1 / 6) / v["last.levels"],
    lambda v: v["wide"].T,
    lambda v: v["wide"].T * v["bias"][:, None],
])  # fmt: skip
def test_a_filter_of_a_linear_layer(fingerprints, make):
    (place,) = fingerprints.filter(make(VALUES), "FULLY_CONNECTED")
    np.testing.assert_allclose(place.value(OTHERS, (8, 6)), make(OTHERS), rtol=1e-6)


def test_a_filter_of_a_convolution(fingerprints):
    def make(v):
        return (v["conv"] * v["gain"].reshape(-1, 1, 1, 1)).transpose(0, 2, 3, 1)

    (place,) = fingerprints.filter(make(VALUES), "CONV_2D")
    np.testing.assert_allclose(place.value(OTHERS, (8, 3, 3, 2)), make(OTHERS), rtol=1e-6)


@pytest.mark.parametrize("make", [
    lambda v: v["bias"],
    lambda v: v["bias"] * THIRD,
    lambda v: v["bias"] * v["gain"],
    lambda v: v["bias"] * np.float32(1 / 6) + np.float32(0.5),
    lambda v: v["bias"] + v["gain"],
    lambda v: v["table"].transpose(0, 2, 1),
    lambda v: v["table"] + v["places"],
    lambda v: np.reciprocal(v["act.levels"]),
    lambda v: v["pair"],
])  # fmt: skip
def test_any_other_constant(fingerprints, make):
    (place,) = fingerprints.other(make(VALUES))
    np.testing.assert_allclose(place.value(OTHERS, make(OTHERS).shape), make(OTHERS), rtol=2e-6)


@pytest.mark.parametrize("make", [
    lambda v, filter_, _: v["bias"] + filter_ @ v["shift"],
    lambda v, filter_, _: filter_ @ v["shift"],
    lambda v, filter_, scale: v["bias"] * scale + filter_ @ v["shift"],
    lambda v, _, scale: v["bias"] * scale + v["gain"],
])  # fmt: skip
@pytest.mark.parametrize("scale_of", [
    lambda _: np.float32(1),
    lambda _: np.float32(1 / 6),
    lambda v: v["gain"],
    lambda v: v["gain"] / np.float32(6),
])  # fmt: skip
def test_the_bias_of_a_linear_layer(fingerprints, make, scale_of):
    def of(values):
        filter_ = values["weight"] * np.reshape(scale_of(values), (-1, 1))
        return filter_, make(values, filter_, scale_of(values))

    (weights, bias), (_, expected) = of(VALUES), of(OTHERS)
    (filter_,) = fingerprints.filter(weights, "FULLY_CONNECTED")
    (place,) = fingerprints.other(bias, filter_, weights)
    np.testing.assert_allclose(place.value(OTHERS, (8,)), expected, rtol=1e-5)


@pytest.mark.parametrize("value", [
    VALUES["bias"] * np.float32(0.7772),
    VALUES["bias"] * VALUES["gain"] * VALUES["gain"],
    VALUES["pair"] * THIRD,
    VALUES["pair"] + VALUES["pair"][::-1],
    np.float32(VALUES["act.levels"] * 0.3),
])  # fmt: skip
def test_nothing_else_is_recognised(fingerprints, value):
    assert not fingerprints.other(value)
    assert not fingerprints.is_of_operators(value)


@pytest.mark.parametrize("value", [np.float32(0.25), np.sqrt(np.float32(3)), THIRD, np.full((2, 3), -np.inf), 2 / 3])
def test_constants_of_operators(fingerprints, value):
    assert fingerprints.is_of_operators(np.asarray(value, np.float32))
    assert not fingerprints.other(np.asarray(value, np.float32))


def test_the_range_of_a_quantiser_holds_something():
    names = [f"{part}{number}" for number in range(30) for part in ("low", "high")]
    numbers = [numpy_helper.from_array(np.float32(0), name) for name in names]
    nodes = [helper.make_node("Clip", ["x", *pair], ["y"]) for pair in zip(names[::2], names[1::2], strict=True)]
    model = with_fingerprints(helper.make_model(helper.make_graph(nodes, "", [], [], numbers)))
    drawn = {tensor.name: float(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    assert all(drawn[f"low{number}"] < -0.4 < 0.4 < drawn[f"high{number}"] for number in range(30))


def test_many_single_numbers_are_far_from_each_other():
    tensors = [numpy_helper.from_array(np.float32(15), f"act{i}.levels") for i in range(1000)]
    model = with_fingerprints(helper.make_model(helper.make_graph([], "", [], [], tensors)))
    levels = np.sort([numpy_helper.to_array(tensor) for tensor in model.graph.initializer])
    assert (np.diff(levels) / levels[1:]).min() > 1e-4


def test_two_filters_of_one_number_are_told_apart():
    uniform = {"one": np.full((8, 2, 3, 3), 0.7312, np.float32), "two": np.full((8, 2, 3, 3), 1.1, np.float32)}
    parameters = [numpy_helper.from_array(value, name) for name, value in {**uniform, "gain": VALUES["gain"]}.items()]
    fingerprints = Fingerprints(helper.make_model(helper.make_graph([], "", [], [], parameters)))
    value = (uniform["two"] * VALUES["gain"].reshape(-1, 1, 1, 1)).transpose(0, 2, 3, 1)
    assert fingerprints.filter(value, "CONV_2D") == [Product("two", "CONV_2D", gain="gain")]


def test_sums_of_what_is_there_in_part():
    """Nothing, for a product or a parameter that a sum lacks."""
    values = {"a": np.array([1, 2, 4, 8], np.float32)}
    assert (Sum(None, "a").value(values, (2, 2)) == values["a"].reshape(2, 2)).all()
    assert (Sum(Product("a"), number=0.5).value(values, (4,)) == values["a"] + np.float32(0.5)).all()
