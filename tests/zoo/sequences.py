"""Attention, recurrence, tokens, and networks with several inputs and outputs."""

from __future__ import annotations

import torch
from entry import Entry
from torch import Tensor, nn
from torch.nn import functional

from tqexport import InputInfo

SEQUENCE, SHORT = (InputInfo("input", (12, 16)),), (InputInfo("input", (4, 16)),)
TOKENS = InputInfo("tokens", (12,), "int64", below=50)
MASK = InputInfo("mask", (12,), "bool")


class Block(nn.Module):
    """Attention of four lines, and two linear layers."""

    def __init__(self, size: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.wide, self.act, self.narrow = nn.Linear(size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, length, size = x.shape
        parts = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, size // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(2, 3) / (size // self.heads) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -30.0)
        x = x + self.out((scores.softmax(3) @ v).transpose(1, 2).reshape(n, length, size))
        return x + self.narrow(self.act(self.wide(self.norm2(x))))


class Encoder(nn.Module):
    """PyTorch's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder, self.last = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(self.first(x)).mean(1))


class Vision(nn.Module):
    """Patches, a token for the class, and places that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.zeros(1, 1, 16))
        self.places, self.block, self.last = nn.Parameter(torch.randn(1, 17, 16) / 5), Block(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.last(self.block(x)[:, 0])


class Translator(nn.Module):
    """A sequence that attends to itself and to another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.last(self.transformer(self.first(source), target))


class Windows(nn.Module):
    """Attention in windows that are moved by half of one."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block, self.last = nn.Conv2d(3, 16, 2, 2), Block(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1).roll((-2, -2), (1, 2))
        n, h, w, c = x.shape
        windows = x.reshape(n, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)
        x = self.block(windows).reshape(n, h // 4, w // 4, 4, 4, c).transpose(2, 3).reshape(n, h, w, c)
        return self.last(x.mean((1, 2)))


class Published(nn.Module):
    """Attention by PyTorch's own function, as published networks write it, with a bias for each distance."""

    def __init__(self, windows: bool) -> None:
        super().__init__()
        self.windows = windows
        self.patches, self.token = nn.Conv2d(3, 24, 2, 2), nn.Parameter(torch.randn(1, 1, 24) / 5)
        self.qkv, self.out, self.last = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 4)
        length = 16 if windows else 65
        self.places, self.norm = nn.Parameter(torch.randn(1, length, 24) / 5), nn.LayerNorm(24)
        self.distances = nn.Parameter(torch.randn(2 * length - 1, 2) / 5)
        steps = torch.arange(length)
        self.register_buffer("distance", steps[:, None] - steps[None, :] + length - 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        if self.windows:  # 4 of 4x4 patches
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        else:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + self.places
        bias = self.distances[self.distance.view(-1)].view(*self.distance.shape, 2).permute(2, 0, 1).unsqueeze(0)
        q, k, v = (part.unflatten(2, (2, 12)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, 2))
        mixed = functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).contiguous()
        x = x + self.out(mixed.reshape(x.shape))
        return self.last(x.reshape(n, -1, c).mean(1) if self.windows else x[:, 0])


class KindsOfTokens(nn.Module):
    """Tokens, their places, and their kinds, which a buffer says."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places, self.kinds = nn.Embedding(50, 20), nn.Embedding(30, 20), nn.Embedding(2, 20)
        self.register_buffer("of_place", torch.arange(30)[None])
        self.register_buffer("of_kind", torch.zeros(1, 30, dtype=torch.int64))
        self.norm, self.block, self.last = nn.LayerNorm(20), Block(20), nn.Linear(20, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.of_place[:, : tokens.shape[1]]
        kinds = self.of_kind.expand(tokens.shape[0], -1).gather(1, places.expand(tokens.shape[0], -1))
        return self.last(self.block(self.norm(self.table(tokens) + self.kinds(kinds) + self.places(places))).mean(1))


class Spectrogram(nn.Module):
    """Frames of a sound as a picture of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.act, self.second = nn.Conv2d(1, 10, 4, 4), nn.ReLU(), nn.Conv2d(10, 12, 2)
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.second(self.act(self.patches(x.unsqueeze(1).transpose(2, 3))))).mean((2, 3)))


class Mixer(nn.Module):
    """Linear layers over places and over channels in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.places, self.act = nn.Linear(16, 16), nn.Linear(12, 12), nn.ReLU()
        self.norm, self.channels, self.last = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.act(self.places(self.norm(x).transpose(1, 2))).transpose(1, 2)
        return self.last((x + self.act(self.channels(x))).mean(1))


class Tokens(nn.Module):
    """Tokens and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.block = nn.Embedding(50, 16), nn.Linear(16, 16), Block()
        self.last = nn.Linear(16, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.block(self.first(self.table(tokens)), mask) * mask[:, :, None]
        return self.last(x.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


class Embedded(nn.Module):
    """Tokens in front of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(50, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.second, self.act, self.last = nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens).transpose(1, 2)
        return self.last(self.act(self.second(self.act(self.first(x)))).amax(2))


class Recurrent(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self, kind: type[nn.RNNBase], **options: int) -> None:
        super().__init__()
        self.first, self.middle, self.act = nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU()
        self.recurrent = kind(16, 16, batch_first=True, **options)
        self.last = nn.Linear((self.recurrent.proj_size or 16) * (1 + self.recurrent.bidirectional), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(self.act(self.middle(self.first(x))))[0][:, -1])


class Gated(nn.Module):
    """A recurrent layer of linear ones, whose state is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.of_input, self.of_state = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 32)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 16)
        for row in self.of_input(self.first(x)).unbind(1):
            new, share = (row + self.of_state(state)).chunk(2, 1)
            state = state + share.sigmoid() * (new.tanh() - state)
        return self.last(state)


class Pair(nn.Module):
    """Two pictures through the same layers, and how alike they are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten())
        self.last = nn.Linear(72, 8)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.last(self.body(left)), self.last(self.body(right))
        return (a * b).sum(1, keepdim=True)


class Several(nn.Module):
    """Classes and a box, as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten())
        self.classes, self.box = nn.Linear(72, 4), nn.Linear(72, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.classes(x), self.box(x).sigmoid()


class Classes(Several):
    """The class as a whole number besides its score."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = super().forward(x)[0].softmax(1)
        return {"score": scores.amax(1), "class": scores.argmax(1)}


ENTRIES = [
    Entry("attention block", lambda: nn.Sequential(nn.Linear(16, 16), Block(), nn.Linear(16, 4)), SEQUENCE),
    Entry("TransformerEncoder", Encoder, SEQUENCE),
    Entry("vision transformer", Vision),
    Entry(
        "encoder and decoder",
        Translator,
        (InputInfo("source", (12, 16)), InputInfo("target", (8, 16))),
        rewritten=False,
    ),
    Entry("attention in moved windows", Windows),
    Entry("a token for the class, PyTorch's attention", lambda: Published(windows=False)),
    Entry("PyTorch's attention in windows", lambda: Published(windows=True)),
    Entry("tokens, their places and their kinds", KindsOfTokens, (TOKENS,), rewritten=False),
    Entry("a spectrogram as a picture", Spectrogram, (InputInfo("input", (20, 12)),)),
    Entry("mixer", Mixer, SEQUENCE),
    Entry("tokens and a mask", Tokens, (TOKENS, MASK)),
    Entry("tokens in front of convolutions", Embedded, (TOKENS,)),
    Entry("LSTM", lambda: Recurrent(nn.LSTM), SEQUENCE),
    Entry("LSTM, projected states", lambda: Recurrent(nn.LSTM, proj_size=8), SEQUENCE),
    Entry("GRU", lambda: Recurrent(nn.GRU), SEQUENCE),
    Entry("GRU, two layers in both directions", lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), SHORT),
    Entry(
        *("attention block, learned ranges", lambda: nn.Sequential(nn.Linear(16, 16), Block(), nn.Linear(16, 4))),
        *(SEQUENCE,),
        learned_ranges=True,
    ),
    Entry("TransformerEncoder, learned ranges", Encoder, SEQUENCE, learned_ranges=True),
    Entry("vision transformer, learned ranges", Vision, learned_ranges=True),
    Entry("recurrence of linear layers, learned ranges", Gated, SEQUENCE, learned_ranges=True),
    Entry("two pictures", Pair, (InputInfo("left", (3, 16, 16)), InputInfo("right", (3, 16, 16)))),
    Entry("a tuple of outputs", Several),
    Entry("whole numbers among the outputs", Classes),
]
