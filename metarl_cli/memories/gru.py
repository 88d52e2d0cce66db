"""Gated recurrent unit (Cho et al. 2014), initialised as RL^2 has it: orthogonal recurrent and Xavier input weights.

r = sigmoid(W_r x + U_r h),   z = sigmoid(W_z x + U_z h),   n = tanh(W_n x + r (U_n h)),   h' = (1 - z) n + z h
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from metarl_cli.core.memory import Memory, MemorySettings
from metarl_cli.core.networks import run
from metarl_cli.core.settings import setting
from metarl_cli.core.types import Key, Params


def gates_orthogonal(key: Key, shape: tuple[int, ...], dtype=float) -> jax.Array:
    """An orthogonal matrix per gate, `[H, 3 H]`."""
    keys = jax.random.split(key, 3)
    return jnp.concatenate([nn.initializers.orthogonal()(k, (shape[0], shape[0]), dtype) for k in keys], axis=1)


@dataclass(frozen=True)
class GRU(Memory):
    features: int

    @property
    def inputs(self) -> nn.Dense:
        return nn.Dense(3 * self.features, kernel_init=nn.initializers.xavier_uniform(), param_dtype=float)

    @property
    def recurrent(self) -> nn.Dense:
        return nn.Dense(3 * self.features, kernel_init=gates_orthogonal, param_dtype=float)

    def init(self, key: Key, inputs: int) -> Params:
        key_inputs, key_recurrent = jax.random.split(key)
        return {
            "inputs": self.inputs.init(key_inputs, jnp.zeros(inputs)),
            "recurrent": self.recurrent.init(key_recurrent, self.init_carry()),
        }

    def init_carry(self) -> jax.Array:
        return jnp.zeros(self.features)

    def step(self, params: Params, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.recur(params, carry, run(self.inputs, params["inputs"], x))

    def sequence(self, params: Params, carry: jax.Array, x: jax.Array, reset: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(h, now):
            projected, reset = now
            return self.recur(params, jnp.where(reset, self.init_carry(), h), projected)

        # One product over all time steps; only the recurrent one has to wait for its turn.
        return jax.lax.scan(step, carry, (run(self.inputs, params["inputs"], x), reset))

    def recur(self, params: Params, h: jax.Array, projected: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`projected [3 H]` is `W x`. The new state is the output as well."""
        x_gates, x_n = jnp.split(projected, [2 * self.features])
        h_gates, h_n = jnp.split(run(self.recurrent, params["recurrent"], h), [2 * self.features])
        r, z = jnp.split(nn.sigmoid(x_gates + h_gates), 2)
        n = jnp.tanh(x_n + r * h_n)
        h = (1 - z) * n + z * h
        return h, h


class GRUSettings(MemorySettings):
    features: int = setting("size of the state", unit="units", ge=1)

    def build(self) -> GRU:
        return GRU(self.features)
