"""Minimal GRU (Feng et al. 2024, arXiv:2410.01201, section 3.1): gates that see the input alone, so that time is parallel.

z_t = sigmoid(W_z x_t),   h_t = (1 - z_t) h_{t-1} + z_t W_h x_t

One such layer adds up what single steps say; what a step means in the light of earlier ones takes a second layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from metarl_cli.core.memory import MemorySettings
from metarl_cli.core.networks import Gates, LinearMemory
from metarl_cli.core.settings import setting
from metarl_cli.core.types import Key, Params


@dataclass(frozen=True)
class MinGRU(LinearMemory):
    @property
    def gates(self) -> Gates:
        return Gates(2, self.features, "xavier")

    def init_recurrence(self, key: Key) -> Params:
        return self.gates.init(key, self.features)

    def init_state(self) -> jax.Array:
        return jnp.zeros(self.features)

    def coefficients(self, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        z, candidate = jnp.split(self.gates(self.gates.weights(params), x), 2)
        z = jax.nn.sigmoid(z)
        return 1 - z, z * candidate

    def output(self, params: Params, h: jax.Array, x: jax.Array) -> jax.Array:
        return h


class MinGRUSettings(MemorySettings):
    features: int = setting("size of a layer and of its state", unit="units", ge=1)
    layers: int = setting("layers, each with a state of its own", ge=1)

    def build(self, length: int) -> MinGRU:
        return MinGRU(self.features, self.layers)
