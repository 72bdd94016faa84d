"""Right files of networks that are built otherwise than most are called right, whatever a converter made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exactness import assert_exact, verdicts
from networks import randomize_
from torch import Tensor, nn

from tqexport import CheckpointInfo, TruncModel, prepare
from tqexport.backends.onnx.export import export_onnx
from tqexport.verification.trace import _in_shape

WIDTHS = (2, 8)


class Base(nn.Module):
    """A float convolution, a quantised one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.last = nn.ReLU(), nn.Linear(8, 4)

    def inside(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(x).mean((2, 3)))


class TiedWeights(Base):
    def __init__(self) -> None:
        super().__init__()
        del self.last  # which prepare leaves in float, so it has to be the last one
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.third.weight = self.second.weight
        self.last = nn.Linear(8, 4)

    def inside(self, x: Tensor) -> Tensor:
        return self.act(self.third(super().inside(x)))


class GroupNorms(Base):
    """The converter rounds these activations before it takes the groups apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8)

    def inside(self, x: Tensor) -> Tensor:
        return self.act(self.norm2(self.second(self.act(self.norm(self.first(x))))))


class Argmax(Base):
    """Whole numbers as the output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


class View(Base):
    """Code that counts on PyTorch's order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(x).view(x.size(0), -1))


class OwnCall(Base):
    """Code that takes a module's weight and calls the function itself."""

    def inside(self, x: Tensor) -> Tensor:
        return self.act(nn.functional.conv2d(self.act(self.first(x)), self.second.weight, self.second.bias, padding=1))


class Embedded(nn.Module):
    """Numbers that whole numbers chose, in front of a float layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.first, self.second = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.act, self.last = nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table((x.abs() * 5).clamp(0, 9).long()).transpose(1, 2)
        return self.last(self.act(self.second(self.act(self.first(x)))).mean(2))


class Windows(Base):
    """Windows of the picture on the axis of the samples."""

    def inside(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        n, c, h, w = x.shape
        x = x.reshape(n, c, 2, h // 2, w).transpose(1, 2).reshape(n * 2, c, h // 2, w)
        return self.act(self.second(x)).reshape(n, 2, 8, h // 2, w).transpose(1, 2).reshape(n, 8, h, w)


@pytest.mark.parametrize("kind", [TiedWeights, GroupNorms, Argmax, View, OwnCall, Embedded])
def test_right_files_are_right(kind):
    torch.manual_seed(0)
    network = randomize_(prepare(kind(), WIDTHS), 1)
    assert_exact(network, (7,) if kind is Embedded else (3, 6, 6), WIDTHS)


def test_activations_of_windows_are_those_of_any_sample():
    torch.manual_seed(0)
    network = randomize_(prepare(Windows(), WIDTHS), 1)
    model = TruncModel(network, CheckpointInfo("test", {}, (3, 6, 6), WIDTHS))
    for bits, content in export_onnx(model, WIDTHS):
        assert all(verdict.passed for verdict in verdicts(model, content, bits))


def test_levels_in_another_order_are_put_in_order_and_none_is_made_right():
    expected = np.random.default_rng(0).integers(0, 4, (2, 8, 3, 3)).astype(np.float32)
    channels_last = np.moveaxis(expected, 1, -1)
    in_files = (
        expected.reshape(2, 2, 36),
        np.moveaxis(expected.reshape(2, 36, 2), -1, 1),
        np.moveaxis(channels_last.reshape(2, 36, 2), -1, 1),
    )
    for in_file in in_files:
        assert np.array_equal(_in_shape(in_file, expected, len(expected)), expected)
        wrong = in_file.copy()
        wrong[1, 0, 5] += 1
        assert np.count_nonzero(_in_shape(wrong, expected, len(expected)) != expected) == 1


class Repeated(nn.Module):
    """One block that is registered under several names, as ``[block] * 3`` does."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.first, self.blocks, self.last = nn.Conv2d(3, 4, 3), nn.ModuleList([block] * 3), nn.Linear(4, 3)
        self.same = self.blocks

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean((2, 3)))


def test_a_module_that_has_several_names():
    assert_exact(prepare(Repeated(), (1, 8)), (3, 8, 7), (1, 8))


class ByFunctions(nn.Module):
    """Code that calls the functions of its layers itself, as Mamba does: a depthwise convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 6, 3), nn.Linear(5, 4)
        self.depthwise, self.linear = nn.Conv1d(6, 6, 4, padding=3, groups=6), nn.Linear(6, 5)
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.first(x)
        weight = self.depthwise.weight.squeeze(1)
        x = self.act(nn.functional.conv1d(x, weight.unsqueeze(1), self.depthwise.bias, padding=3, groups=6))
        x = self.linear.weight @ x + self.linear.bias[:, None]
        return self.last(x.mean(2))


@pytest.mark.parametrize("steps", [5, 6, 9])
def test_functions_of_layers(steps):
    torch.manual_seed(1)
    assert_exact(prepare(ByFunctions(), (1, 4, 8)), (3, steps), (1, 4, 8))


class Squared(Base):
    """A matrix times itself, which XNNPACK gets wrong where a file says so."""

    def inside(self, x):
        x = self.act(self.first(x))
        return self.act(self.second(x @ x / 8))


def test_a_product_of_a_value_with_itself():
    torch.manual_seed(1)
    assert_exact(prepare(Squared(), (1, 8)), (3, 8, 8), (1, 8))


class Even(Base):
    """An output of one number throughout, in an order of axes that its shape alone tells."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        nn.init.zeros_(self.norm.weight)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return self.norm(self.last(self.inside(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def test_an_output_of_one_number_has_the_shape_of_its_axes():
    assert_exact(prepare(Even(), (1, 8)), (3, 6, 5), (1, 8))
