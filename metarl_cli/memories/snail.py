"""SNAIL (Mishra et al. 2018, arXiv:1707.03141): temporal convolutions that gather, attention that picks out.

A dense block of dilation d appends `tanh(u) sigmoid(v)` to its input, with u and v linear in `[x_{t-d}, x_t]`; a TC block is
dense blocks of dilations 1, 2, 4 ... until they see the whole trial; an attention block appends what one head reads
(section 3, figure 2). The network is linear, TC, attention, TC, attention. A last linear layer brings all that has been
appended to `features`.

The carry is bounded: each convolution keeps the last d of what its earlier tap gave, each head the last `context` keys and
values, and the newest of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from metarl_cli.core.memory import Carry, LookingBack, MemorySettings, attend, delayed, steps_before
from metarl_cli.core.networks import dense
from metarl_cli.core.settings import setting

BLOCKS = 2  # of each kind


def tap(units: int, bias: bool = True) -> nn.Dense:
    """One of the two of a convolution, which starts as Glorot's: with fans that count both."""
    init = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
    return nn.Dense(units, use_bias=bias, kernel_init=init, param_dtype=float)


class Trunk(nn.Module):
    features: int
    filters: int
    keys: int
    context: int

    @nn.compact
    def __call__(self, carry, x, reset):
        """`carry["past"]` holds a ring per dilation for each TC block, and those of keys and values for each head."""
        before = steps_before(carry["time"], reset)
        x = dense(self.filters)(x)
        past = []
        for convolutions, rings in carry["past"]:
            kept = []
            for i, ring in enumerate(convolutions):
                earlier, ring = delayed(ring, tap(2 * self.filters, bias=False)(x), before, 2**i)
                u, v = jnp.split(tap(2 * self.filters)(x) + earlier, 2, axis=-1)
                kept.append(ring)
                x = jnp.concatenate([x, jnp.tanh(u) * nn.sigmoid(v)], axis=-1)
            key, value, query = dense(self.keys, bias=False)(x), dense(self.filters)(x), dense(self.keys)(x)
            read, rings = attend(query, key, value, rings, before, self.context)
            x = jnp.concatenate([x, read], axis=-1)
            past.append((kept, rings))
        return {"time": before[-1] + 1, "past": past}, dense(self.features)(x)


@dataclass(frozen=True)
class SNAIL(LookingBack):
    features: int
    filters: int
    keys: int
    context: int

    @property
    def trunk(self) -> Trunk:
        return Trunk(self.features, self.filters, self.keys, self.context)

    def init_carry(self) -> Carry:
        dilations = [2**i for i in range(self.context.bit_length())]  # together they reach back 2^n - 1 >= context steps
        convolutions = [jnp.zeros((dilation + 1, 2 * self.filters)) for dilation in dilations]
        head = tuple(jnp.zeros((self.context + 1, n)) for n in (self.keys, self.filters))
        return {"time": jnp.zeros((), int), "past": [(convolutions, head)] * BLOCKS}


class SNAILSettings(MemorySettings):
    features: int = setting("size of what it gives out", unit="units", ge=1)
    filters: int = setting("channels that each block appends", unit="units", ge=1)
    keys: int = setting("size of keys and queries", unit="units", ge=1)
    context: int | None = setting("earlier steps to see; null: all those of a trial in training", unit="steps", ge=0)

    def build(self, length: int) -> SNAIL:
        return SNAIL(self.features, self.filters, self.keys, length - 1 if self.context is None else self.context)
