"""What an artifact says of itself is read as it was written, and a damaged record is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import model_of
from torch import nn

from tqexport import Normalization, Scheme, prepare
from tqexport.errors import InputError
from tqexport.facts import DAMAGED, ArtifactFacts, MultiWidthFacts, decode, encode, facts_of_model
from tqexport.truncation import WIDTHS

FACTS = ArtifactFacts(
    width=4,
    activation_width=32,
    batch_norm_width=8,
    scheme=Scheme(bias_correction=True),
    architecture="package.module:factory",
    checkpoint_sha256="ab" * 32,
    layout="channels last",
    class_names=("a", "ç"),
    normalization=Normalization((0.5, 0.25), (1.0, 2.0)),
    kernel="dynamic",
    channels_first=("output",),
    steps_in_front={"act/Round": 3},
)
RUNTIME = MultiWidthFacts(
    {bits: replace(FACTS, width=bits, kernel=kernel) for bits, kernel in ((2, None), (8, "exact"))},
    {2: "aa", 8: "bb"},
    tables={"places": [1, 2]},
)

numbers = st.floats(-1e6, 1e6)
words = st.lists(st.text(max_size=5), max_size=3).map(tuple)
schemes = st.sampled_from(
    [Scheme(), Scheme("dorefa"), Scheme("dorefa", True), Scheme(bias_correction=True), Scheme(power_of_two_scale=True)]
)
normalizations = st.lists(st.tuples(numbers, numbers.map(lambda n: abs(n) or 1.0)), min_size=1, max_size=3).map(
    lambda pairs: Normalization(*map(tuple, zip(*pairs, strict=True)))
)
some_facts = st.builds(
    ArtifactFacts,
    width=st.sampled_from(WIDTHS),
    activation_width=st.sampled_from((*WIDTHS, 32)),
    batch_norm_width=st.sampled_from((*WIDTHS, 32)),
    scheme=schemes,
    architecture=st.text(),
    checkpoint_sha256=st.text(),
    layout=st.text(),
    class_names=words,
    normalization=st.none() | normalizations,
    kernel=st.none() | st.sampled_from(["exact", "dynamic"]),
    channels_first=words,
    steps_in_front=st.dictionaries(st.text(max_size=5), st.integers(1, 128), max_size=3),
)


@st.composite
def facts_of_several_widths(draw):
    widths = sorted(draw(st.sets(st.sampled_from(WIDTHS), min_size=1)))
    by_width = {bits: replace(draw(some_facts), width=bits) for bits in widths}
    digests = {bits: draw(st.text(max_size=5)) for bits in widths} if draw(st.booleans()) else {}
    tables = draw(st.dictionaries(st.sampled_from(["table_places", "weights"]), st.lists(st.integers())))
    return MultiWidthFacts(by_width, digests, draw(st.none() | st.sampled_from(widths)), tables)


@given(some_facts)
def test_facts_of_fixed_files_come_back(facts):
    assert decode(json.loads(json.dumps(encode(facts)))) == facts


@given(facts_of_several_widths())
def test_facts_of_run_time_and_truncatable_files_come_back(facts):
    decoded = decode(json.loads(json.dumps(encode(facts))))
    assert decoded == facts
    assert decoded.widths == tuple(facts.by_width)


def test_a_record_says_nothing_that_is_not_so():
    optional = {"normalization", "kernel", "channels_first", "steps_in_front"}
    plain = replace(FACTS, normalization=None, kernel=None, channels_first=(), steps_in_front={})
    assert not optional & set(encode(plain))
    assert optional <= set(encode(FACTS))


def test_facts_of_a_network_are_those_of_its_description():
    scheme = Scheme(power_of_two_scale=True)
    network = prepare(nn.Linear(4, 2), (2, 8), scheme=scheme, float_layers=[])
    model = model_of(network, (4,), (2, 8), scheme, (4, 32))
    facts = facts_of_model(replace(model, sha256="cd"), 8, "channels first")
    assert facts == ArtifactFacts(8, 32, 8, scheme, "test", "cd", "channels first")


@pytest.mark.parametrize("width", [None, 0, 9, 32, "4", [4], 4.0, "missing"])
def test_a_record_without_a_width_is_not_of_tqexport(width):
    record = {**encode(FACTS), "width": width}
    if width == "missing":
        del record["width"]
    with pytest.raises(InputError, match=r"was not written by tqexport, or lost its metadata since: it does not say"):
        decode(record)


NEEDED = sorted(set(encode(FACTS)) - {"width", "normalization", "kernel", "channels_first", "steps_in_front"})


@pytest.mark.parametrize("key", NEEDED)
def test_a_record_that_lacks_a_fact_is_damaged(key):
    record = encode(FACTS)
    del record[key]
    with pytest.raises(InputError, match=DAMAGED):
        decode(record)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_width", "many"),
        ("batch_norm_width", []),
        ("quantizer", "magic"),
        ("class_names", 3),
        ("normalization", {"mean": [0.5]}),
        ("normalization", {"mean": ["x"], "std": [1]}),
        ("normalization", "none"),
        ("channels_first", 1),
        ("steps_in_front", ["act/Round"]),
        ("steps_in_front", {"act/Round": 0}),
    ],
)
def test_a_fact_of_another_kind_is_damage(key, value):
    with pytest.raises(InputError):
        decode({**encode(FACTS), key: value})


@pytest.mark.parametrize(
    "damage",
    [
        {"widths": []},
        {"widths": [2, 9]},
        {"widths": [2, "8"]},
        {"widths": 8},
        {"widths": [2]},
        {"widths": None},
        {"fixed_sha256": ["aa"]},
        {"fixed_sha256": None},
        {"by_width": {"width": [2]}},
        {"by_width": {"width": [2, 99]}},
        {"by_width": []},
        {"by_width": None},
    ],
    ids=str,
)
def test_damage_to_what_is_said_of_several_widths_is_found(damage):
    record = encode(RUNTIME)
    assert decode(record) == RUNTIME
    with pytest.raises(InputError):
        decode({**record, **damage})
