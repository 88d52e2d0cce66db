"""A causal transformer with gated residuals (GTrXL, Parisotto et al. 2020, arXiv:1910.06764), with a cache while acting.

For the attention and for the two-layer perceptron of each layer: `x' = g(x, relu(f(LayerNorm(x))))`, with the gate
r = sigmoid(W_r y + U_r x),  z = sigmoid(W_z y + U_z x - 2),  n = tanh(W_n y + U_n (r x)),  g(x, y) = (1 - z) x + z n
whose bias lets a layer start close to the identity (section 3.2). Positions enter as rotations of queries and keys (Su et
al. 2021), where GTrXL has those of Transformer-XL: both tell the distance of two steps and nothing else.

A step attends to itself and to `context` earlier ones of its trial: their keys and values are the carry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from metarl_cli.core.errors import ConfigError
from metarl_cli.core.memory import Carry, LookingBack, MemorySettings, attend, steps_before
from metarl_cli.core.networks import dense
from metarl_cli.core.settings import setting

BASE = 1000.0  # wave lengths from 2 pi to 2 pi times this, in steps: trials have up to thousands of them
GATE = 2.0


def rotate(x: jax.Array, position: jax.Array) -> jax.Array:
    """`x [T, heads, d]`: the i-th pair of numbers turned by `position BASE^(-2 i / d)`."""
    half = x.shape[-1] // 2
    angle = position[:, None] * BASE ** (-jnp.arange(half) / half)[None]
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


class Gate(nn.Module):
    """Of the gated recurrent unit, with x for the state and y for the input."""

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        n = x.shape[-1]
        y_r, y_z, y_n = jnp.split(dense(3 * n)(y), 3, axis=-1)
        x_r, x_z = jnp.split(dense(2 * n, bias=False)(x), 2, axis=-1)
        z = nn.sigmoid(y_z + x_z - GATE)
        return (1 - z) * x + z * jnp.tanh(y_n + dense(n, bias=False)(nn.sigmoid(y_r + x_r) * x))


class Layer(nn.Module):
    heads: int
    context: int

    @nn.compact
    def __call__(self, x, before, rings):
        """`x [T, F]`; the rings are of each head: `[heads, W + 1, d]`."""
        shape = (x.shape[0], self.heads, x.shape[-1] // self.heads)
        qkv = dense(3 * x.shape[-1], bias=False)(nn.LayerNorm(param_dtype=float)(x))
        query, key, value = (part.reshape(shape) for part in jnp.split(qkv, 3, axis=-1))
        heads = jax.vmap(partial(attend, before=before, window=self.context), in_axes=(1, 1, 1, 0), out_axes=(1, 0))
        y, rings = heads(rotate(query, before), rotate(key, before), value, rings)
        x = Gate()(x, nn.relu(dense(x.shape[-1])(y.reshape(x.shape))))
        y = nn.relu(dense(2 * x.shape[-1])(nn.LayerNorm(param_dtype=float)(x)))
        return Gate()(x, nn.relu(dense(x.shape[-1])(y))), rings


class Trunk(nn.Module):
    features: int
    layers: int
    heads: int
    context: int

    @nn.compact
    def __call__(self, carry, x, reset):
        before = steps_before(carry["time"], reset)
        x = dense(self.features)(x)
        past = []
        for rings in carry["past"]:
            x, rings = Layer(self.heads, self.context)(x, before, rings)
            past.append(rings)
        return {"time": before[-1] + 1, "past": past}, x


@dataclass(frozen=True)
class Transformer(LookingBack):
    features: int
    layers: int
    heads: int
    context: int

    @property
    def trunk(self) -> Trunk:
        return Trunk(self.features, self.layers, self.heads, self.context)

    def init_carry(self) -> Carry:
        ring = jnp.zeros((self.heads, self.context + 1, self.features // self.heads))
        return {"time": jnp.zeros((), int), "past": [(ring, ring)] * self.layers}


class TransformerSettings(MemorySettings):
    features: int = setting("size of a layer", unit="units", ge=1)
    layers: int = setting("layers of attention", ge=1)
    heads: int = setting("heads of attention; twice their number divides algo.memory.features", ge=1)
    context: int | None = setting("earlier steps to attend to; null: all those of a trial in training", unit="steps", ge=0)

    def build(self, length: int) -> Transformer:
        if self.features % 2:
            raise ConfigError("algo.memory.features", self.features, "must be even: rotations turn pairs of numbers")
        if self.features % (2 * self.heads):
            allowed = [n for n in range(1, self.features // 2 + 1) if self.features % (2 * n) == 0]
            problem = f"twice their number must divide algo.memory.features={self.features}"
            raise ConfigError("algo.memory.heads", self.heads, problem, allowed=allowed)
        return Transformer(self.features, self.layers, self.heads, length - 1 if self.context is None else self.context)
