"""Linear recurrent unit (Orvieto et al. 2023, arXiv:2303.06349, section 3): a diagonal complex recurrence on a ring.

h_t = lambda h_{t-1} + gamma B x_t,   y_t = Re(C h_t) + D x_t,   lambda = exp(-exp(nu) + i exp(theta))

|lambda|^2 starts uniform on [0.9^2, 0.999^2], its phase uniform on [0, pi / 10]: a memory of 10 to 1000 steps, as the paper
has it where sequences are long. gamma starts at sqrt(1 - |lambda|^2), at which the state's size does not depend on |lambda|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from metarl_cli.core.memory import MemorySettings
from metarl_cli.core.networks import LinearMemory
from metarl_cli.core.settings import setting
from metarl_cli.core.types import Key, Params

RADIUS = (0.9, 0.999)
PHASE = math.pi / 10


@dataclass(frozen=True)
class LRU(LinearMemory):
    state: int  # N

    def init_recurrence(self, key: Key) -> Params:
        key_radius, key_phase, key_b, key_c, key_d = jax.random.split(key, 5)
        squared = jax.random.uniform(key_radius, (self.state,), minval=RADIUS[0] ** 2, maxval=RADIUS[1] ** 2)
        phase = PHASE * (1 - jax.random.uniform(key_phase, (self.state,)))  # above 0
        b = jax.random.normal(key_b, (2, self.state, self.features)) / math.sqrt(2 * self.features)
        c = jax.random.normal(key_c, (2, self.features, self.state)) / math.sqrt(self.state)
        return {
            "nu": jnp.log(-0.5 * jnp.log(squared)),
            "theta": jnp.log(phase),
            "gamma": 0.5 * jnp.log(1 - squared),
            "b": b,
            "c": c,
            "d": jax.random.normal(key_d, (self.features,)),
        }

    def init_state(self) -> jax.Array:
        return jnp.zeros(self.state, complex)

    def coefficients(self, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        decay = jnp.exp(jax.lax.complex(-jnp.exp(params["nu"]), jnp.exp(params["theta"])))
        gamma, b = jnp.exp(params["gamma"]), params["b"]
        return decay, jax.lax.complex(gamma * (b[0] @ x), gamma * (b[1] @ x))

    def output(self, params: Params, h: jax.Array, x: jax.Array) -> jax.Array:
        c = params["c"]
        return c[0] @ h.real - c[1] @ h.imag + params["d"] * x


class LRUSettings(MemorySettings):
    features: int = setting("size of a layer", unit="units", ge=1)
    state: int = setting("size N of a layer's state", unit="complex numbers", ge=1)
    layers: int = setting("layers, each with a state of its own", ge=1)

    def build(self, length: int) -> LRU:
        return LRU(self.features, self.layers, self.state)
