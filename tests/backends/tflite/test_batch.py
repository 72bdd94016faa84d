"""TFLite files of several samples at once: right ones pass, wrong ones fail, and any number of samples runs in them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from damage import changed_tflite, flip_a_bit
from networks import model_of, randomize_
from torch import nn

from tqexport import prepare
from tqexport.artifacts.truncate import truncate_file
from tqexport.backends import run_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite.convert import check_convertible, convert_to_tflite
from tqexport.backends.tflite.runtime_file import convert_to_runtime_tflite
from tqexport.errors import ConversionError
from tqexport.runtime import SwitchableModel
from tqexport.verification.comparison import compare

BATCH = 3
SAMPLES = np.random.default_rng(0).random((5, 2, 6, 5), np.float32)  # more than a batch, and no whole number of them


def files(network, shape, widths=(2, 8)):
    model = model_of(randomize_(prepare(network, widths), 5), shape, widths)
    return model, [onnx.load_from_string(content) for _, content in export_onnx(model, widths)]


def small():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12, 4)),
    )


def test_files_of_a_batch_pass_and_changed_ones_fail():
    model, models = files(small(), (2, 6, 5))
    run_time, fixed = convert_to_runtime_tflite(models, batch=BATCH)
    switchable = SwitchableModel(run_time)
    for bits, content in fixed.items():
        assert truncate_file(run_time, bits) == content
        for file, width in ((content, None), (run_time, bits)):
            found = compare(model, bits, run_file(file, SAMPLES, width), SAMPLES)
            assert found.passed, found.problems
            assert found.samples == len(SAMPLES)
        switchable.bits = bits
        answers = switchable.run(np.moveaxis(SAMPLES, 1, -1))
        assert np.array_equal(answers, run_file(content, SAMPLES).output)
    wrong = changed_tflite(fixed[8], "3.weight.codes", flip_a_bit)
    assert compare(model, 8, run_file(wrong, SAMPLES), SAMPLES).codes_wrong == 1


def test_what_is_repeated_for_each_sample_is_in_the_file_once():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.token, self.act = nn.Parameter(torch.zeros(1, 1, 8)), nn.ReLU()

        def forward(self, x):
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.first(x)], 1)
            return self.last(self.act(self.middle(x)).mean(1))

    model, models = files(Tokens(), (4, 6))
    samples = np.random.default_rng(0).random((5, 4, 6), np.float32)
    one, several = convert_to_tflite(models), convert_to_tflite(models, batch=BATCH)
    for bits, alone, content in zip((2, 8), one, several, strict=True):
        assert len(content) < len(alone) + 500
        for file in (alone, content):
            found = compare(model, bits, run_file(file, samples), samples)
            assert found.passed, found.problems
    assert not compare(
        model, 8, run_file(changed_tflite(several[1], "middle.weight.codes", flip_a_bit), samples), samples
    ).passed


def test_samples_that_depend_on_each_other_are_refused():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act0, self.second = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)
            self.act1, self.last = nn.ReLU(), nn.Linear(6, 2)

        def forward(self, x):
            x = self.act0(self.first(x))
            return self.last(self.act1(self.second(x - x.mean(0, keepdim=True))))

    _, models = files(Mixing(), (6,), (8,))
    with pytest.raises(ConversionError, match=r"every sample by itself.*leave --batch out"):
        convert_to_tflite(models, batch=2)


def test_an_output_with_the_steps_of_a_sequence_in_front_is_refused_before_the_conversion():
    class StepsFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.middle, self.last = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.middle(self.act(self.first(x)).transpose(0, 1)))

    _, models = files(StepsFirst(), (4, 6), (8,))
    check_convertible(models)
    with pytest.raises(ConversionError, match=r"has something else than its samples in front.*leave --batch out"):
        check_convertible(models, batch=2)


def test_an_index_is_not_taken_for_a_number_of_samples():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.middle, self.last = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.middle(self.act(self.first(x)))[:, -1])

    steps = 8  # the last of which is 7, the least number that the converter is given
    model, models = files(Last(), (steps, 6), (8,))
    samples = np.random.default_rng(0).random((5, steps, 6), np.float32)
    for batch in (1, BATCH):
        (content,) = convert_to_tflite(models, batch=batch)
        found = compare(model, 8, run_file(content, samples), samples)
        assert found.passed, found.problems
