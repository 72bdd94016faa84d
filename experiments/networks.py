"""Networks beyond the library's own: convolutional, recurrent, a small transformer, and truncatable activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tqexport import ActivationQuantizer
from tqexport.truncation import STORED_BITS, Quantizer, direct_codes, max_code, truncate

__all__ = ["CodedActivation", "conv1d", "recurrent", "transformer", "with_coded_activations"]


def conv1d(channels: int = 16, classes: int = 4) -> nn.Module:
    """Three strided convolutions. Input (N, 1, L), output (N, classes)."""
    blocks: list[nn.Module] = []
    for before, after in ((1, channels), (channels, 2 * channels), (2 * channels, 4 * channels)):
        blocks += [nn.Conv1d(before, after, 5, stride=2, padding=2, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4 * channels, classes))


class _Block(nn.Module):
    """Pre-norm attention and a two-layer perceptron. (N, tokens, size) in and out."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query, self.key, self.value, self.mix = (nn.Linear(size, size) for _ in range(4))
        self.perceptron = nn.Sequential(nn.Linear(size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        parts = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.mix(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        out: Tensor = x + self.perceptron(self.norm(x))
        return out


class _Transformer(nn.Module):
    def __init__(self, size: int, heads: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, size)
        self.position = nn.Parameter(0.02 * torch.randn(8, size))
        self.blocks = nn.Sequential(*(_Block(size, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(size)
        self.classifier = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embedding(x[:, 0]) + self.position)
        out: Tensor = self.classifier(self.norm(x).mean(1))
        return out


def transformer(size: int = 32, heads: int = 2, blocks: int = 2, classes: int = 10) -> nn.Module:
    """A transformer whose tokens are the rows of an image. Input (N, 1, 8, 8), output (N, classes).

    LayerNorm in the place of BatchNorm, so nothing of it depends on the width but the codes and the activations of the
    perceptrons.
    """
    return _Transformer(size, heads, blocks, classes)


class _Recurrent(nn.Module):
    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, size)
        self.of_input, self.of_state = nn.Linear(size, 3 * size), nn.Linear(size, 3 * size)
        self.classifier = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.of_input(self.embedding(x[:, 0])).unbind(1)
        state = torch.zeros_like(rows[0].chunk(3, -1)[0])
        for row in rows:
            (reset, update, new), (reset_of, update_of, new_of) = row.chunk(3, -1), self.of_state(state).chunk(3, -1)
            candidate = (new + (reset + reset_of).sigmoid() * new_of).tanh()
            share = (update + update_of).sigmoid()
            state = share * state + (1 - share) * candidate
        out: Tensor = self.classifier(state)
        return out


def recurrent(size: int = 48, classes: int = 10) -> nn.Module:
    """A GRU, written with linear layers, that reads an image row by row. Input (N, 1, 8, 8), output (N, classes).

    The formulas are those of ``torch.nn.GRU``. It has no ReLU, so nothing of it but its weights is quantised where no
    ranges are learned.
    """
    return _Recurrent(size, classes)


class CodedActivation(ActivationQuantizer):
    """Activations as codes: quantised straight to the width, or stored with 8 bits and shifted right.

    Attributes:
        quantizer: ``truncquant`` floors, ``dorefa`` rounds, as :class:`ActivationQuantizer` does.
        stored: Keep 8-bit codes and shift them.
    """

    def __init__(self, quantizer: Quantizer, stored: bool = False) -> None:
        super().__init__()
        self.quantizer: Quantizer = quantizer
        self.stored = stored

    def forward(self, input: Tensor) -> Tensor:
        clamped = input.clamp(0, 1)
        if self.stored:
            codes = truncate(direct_codes(clamped, STORED_BITS, self.quantizer).byte(), self.bits)
        else:
            codes = direct_codes(clamped, self.bits, self.quantizer)
        return clamped + (codes / max_code(self.bits) - clamped).detach()  # the gradient of the clamp


def with_coded_activations(network: nn.Module, quantizer: Quantizer) -> nn.Module:
    """A network of ``prepare`` with its activation quantisers replaced; in place, and returned."""
    for module in network.modules():
        for name, child in module.named_children():
            if type(child) is ActivationQuantizer:
                setattr(module, name, CodedActivation(quantizer))
    return network
