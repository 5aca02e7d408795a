"""A small transformer that turns one sequence of characters into another of a fixed length.

In float16 NumPy multiplies matrices a hundred times slower than in float32. So on CPUs what is
float16 is multiplied in float32, as GPUs add up such products; what is kept is float16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

Array = Any
"""An array of NumPy's or CuPy's."""


def in_float32(product: Callable[..., chainer.Variable], *factors: Any) -> chainer.Variable:
    """Multiplies in float32 on CPUs, and rounds to float16 if that is what the factors are."""
    if factors[0].dtype != np.float16 or factors[0].xp is not np:
        return product(*factors)
    return F.cast(product(*(F.cast(each, np.float32) for each in factors)), np.float16)


class Linear(L.Linear):
    """One that takes arrays of any number of axes, and multiplies the last."""

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        product = functools.partial(F.linear, n_batch_axes=x.ndim - 1)
        return in_float32(product, x, self.W, self.b)


class Norm(L.LayerNormalization):
    """One that takes arrays of any number of axes, and normalizes the last."""

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)


class Attention(chainer.Chain):
    """Lets each position of a sequence look at those of another, or of itself."""

    def __init__(self, n_units: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        with self.init_scope():
            self.query = Linear(n_units, n_units)
            self.key = Linear(n_units, n_units)
            self.value = Linear(n_units, n_units)
            self.out = Linear(n_units, n_units)

    def forward(self, x: chainer.Variable, seen: chainer.Variable, mask: Array) -> chainer.Variable:
        """Gives each position of ``x`` the mean of what it looks at in ``seen``.

        Args:
            x: Of shape (batch, length, units).
            seen: Of shape (batch, other length, units).
            mask: Whether a position may look at another: broadcast to (batch, heads, length,
                other length).
        """
        batch, length, units = x.shape
        query, key, value = (
            F.transpose(each.reshape(batch, -1, self.n_heads, units // self.n_heads), (0, 2, 1, 3))
            for each in (self.query(x), self.key(seen), self.value(seen))
        )
        scores = in_float32(functools.partial(F.matmul, transb=True), query, key)
        scores *= (units // self.n_heads) ** -0.5
        away = self.xp.full(scores.shape, -1e4, scores.dtype)
        weights = F.softmax(F.where(self.xp.broadcast_to(mask, scores.shape), scores, away), axis=3)
        heads = F.transpose(in_float32(F.matmul, weights, value), (0, 2, 1, 3))
        return self.out(heads.reshape(batch, length, units))


class Layer(chainer.Chain):
    """Attention to itself, for a decoder attention to the source, and a network of two layers."""

    def __init__(self, n_units: int, n_heads: int, decodes: bool) -> None:
        super().__init__()
        with self.init_scope():
            self.norm1 = Norm(n_units)
            self.attention = Attention(n_units, n_heads)
            if decodes:
                self.norm2 = Norm(n_units)
                self.to_source = Attention(n_units, n_heads)
            self.norm3 = Norm(n_units)
            self.l1 = Linear(n_units, 2 * n_units)
            self.l2 = Linear(2 * n_units, n_units)

    def forward(
        self, x: chainer.Variable, mask: Array, source: Any = None, source_mask: Any = None
    ) -> chainer.Variable:
        h = self.norm1(x)
        x += self.attention(h, h, mask)
        if source is not None:
            x += self.to_source(self.norm2(x), source, source_mask)
        return x + self.l2(F.relu(self.l1(self.norm3(x))))


class Transformer(chainer.Chain):
    """Reads numbers of characters, of which 0 fills up, and tells as many others.

    Args:
        n_chars: How many characters there are.
        lengths: Of the source, and of what it is turned into.
        n_units: Of each position; divisible by the number of heads.
        n_heads: Of each attention.
        n_layers: Of the encoder, and of the decoder.
    """

    def __init__(
        self, n_chars: int, lengths: tuple[int, int], n_units: int, n_heads: int, n_layers: int
    ) -> None:
        super().__init__()
        self.length = lengths[1]
        layer = functools.partial(Layer, n_units, n_heads)
        normal = chainer.initializers.Normal(0.1)
        with self.init_scope():
            self.embed = L.EmbedID(n_chars, n_units, normal)
            self.source_positions = chainer.Parameter(normal, (lengths[0], n_units))
            self.positions = chainer.Parameter(normal, (lengths[1], n_units))
            self.encoder = chainer.ChainList(*(layer(decodes=False) for _ in range(n_layers)))
            self.decoder = chainer.ChainList(*(layer(decodes=True) for _ in range(n_layers)))
            self.source_norm, self.norm = Norm(n_units), Norm(n_units)
            self.out = Linear(n_units, n_chars)

    def encode(self, source: Array) -> tuple[chainer.Variable, Array]:
        mask = (source != 0)[:, None, None, :]
        h = self.embed(source)
        h += F.broadcast_to(self.source_positions, h.shape)
        for layer in self.encoder:
            h = layer(h, mask)
        return self.source_norm(h), mask

    def decode(
        self, source: chainer.Variable, source_mask: Array, before: Array
    ) -> chainer.Variable:
        """Gives the scores of the next character after each of those that are there before."""
        length = before.shape[1]
        mask = self.xp.tri(length, dtype=bool)
        h = self.embed(before)
        h += F.broadcast_to(self.positions[:length], h.shape)
        for layer in self.decoder:
            h = layer(h, mask, source, source_mask)
        return self.out(self.norm(h))

    def loss(self, source: Array, target: Array) -> chainer.Variable:
        before = self.xp.pad(target[:, :-1], [(0, 0), (1, 0)])
        scores = self.decode(*self.encode(source), before)
        scores = F.cast(scores.reshape(-1, scores.shape[-1]), np.float32)
        loss = F.softmax_cross_entropy(scores, target.ravel())
        chainer.report({"loss": loss}, self)
        return loss

    def translate(self, source: Array) -> Array:
        """Chooses the likeliest character, one after the other."""
        encoded = self.encode(source)
        result = self.xp.zeros((len(source), 1), np.int32)
        for _ in range(self.length):
            scores = self.decode(*encoded, result).array[:, -1]
            likeliest = scores.argmax(axis=1).astype(np.int32)
            result = self.xp.concatenate([result, likeliest[:, None]], axis=1)
        return result[:, 1:]

    def evaluate(self, source: Array, target: Array) -> None:
        """Reports the loss, and which part of the sequences is wholly right."""
        self.loss(source, target)
        right = (self.translate(source) == target).all(axis=1)
        chainer.report({"exact": right.mean()}, self)
