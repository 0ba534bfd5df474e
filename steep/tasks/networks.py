"""The small networks of the tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with an activation between them: (B, ...) to (B, widths[-1]).

    Args:
        widths: inputs, hidden layers, outputs.
        activation: made anew for each hidden layer.

    Example:
        >>> MLP(64, 32, 10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, *widths: int, activation: Callable[[], nn.Module] = nn.ReLU):
        super().__init__()
        layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), activation())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


class SmallCNN(nn.Module):
    """Convolution, GroupNorm, ReLU and pooling for each of `channels`; then the mean over positions and a linear head.

    Takes images of any size, (B, inputs, H, W), or sequences, (B, inputs, T), to (B, outputs).

    Args:
        inputs: input channels.
        outputs: number of classes.
        channels: of each block, multiples of `groups`.
        dimensions: 2 for images, 1 for sequences.
        groups: of each GroupNorm.
    """

    def __init__(
        self, inputs: int, outputs: int, channels: Sequence[int] = (16, 32, 64), *, dimensions: int = 2, groups: int = 4
    ):
        super().__init__()
        conv, pool = (getattr(nn, f"{kind}{dimensions}d") for kind in ("Conv", "MaxPool"))
        layers: list[nn.Module] = []
        for i, o in pairwise((inputs, *channels)):
            # ceil_mode: a single pixel survives pooling, so no input is too small
            layers += [conv(i, o, 3, padding=1), nn.GroupNorm(groups, o), nn.ReLU(), pool(2, ceil_mode=True)]
        self.layers = nn.Sequential(*layers[:-1])
        self.head = nn.Linear(channels[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(2).mean(2))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)); (B, T, width) to the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, d)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Decoder-only language model: token ids (B, T) to logits of the next token (B, T, vocabulary).

    Args:
        vocabulary: number of token ids.
        context: longest T.
        width, depth, heads: of the blocks.
        tied: the head shares the token embedding's weight.

    Raises:
        ValueError: `width` is no multiple of `heads`.
    """

    def __init__(
        self, vocabulary: int, context: int, *, width: int = 64, depth: int = 2, heads: int = 2, tied: bool = True
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=width**-0.5)  # logits of variance 1 from a tied head
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        return self.head(self.norm(self.blocks(x)))


class FourierFeatures(nn.Module):
    """Fixed random features (sin 2πxF, cos 2πxF) of coordinates: (B, inputs) to (B, 2 * features) (arXiv 2006.10739).

    Args:
        inputs: number of coordinates.
        features: number of frequencies, the columns of F.
        scale: standard deviation of the entries of F, in periods per unit length.
    """

    frequencies: Tensor

    def __init__(self, inputs: int, features: int, *, scale: float):
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(inputs, features))

    def forward(self, x: Tensor) -> Tensor:
        phase = 2 * math.pi * x @ self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=-1)
