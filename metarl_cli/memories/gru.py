"""Gated recurrent unit (Cho et al. 2014), initialised as RL^2 has it: orthogonal recurrent and Xavier input weights.

r = sigmoid(W_r x + U_r h),   z = sigmoid(W_z x + U_z h),   n = f(W_n x + r (U_n h)),   h' = (1 - z) n + z h

f is tanh; Duan et al. 2016 took ReLU. With layer normalisation each of the six products is normalised over its gate (Ba et
al. 2016); with weight normalisation each unit's weights are (Salimans and Kingma 2016).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from metarl_cli.core.memory import Memory, MemorySettings
from metarl_cli.core.networks import ACTIVATIONS, Activation, Gates
from metarl_cli.core.settings import setting
from metarl_cli.core.types import Key, Params


@dataclass(frozen=True)
class GRU(Memory):
    features: int
    activation: Activation = "tanh"
    layer_norm: bool = False
    weight_norm: bool = False

    @property
    def inputs(self) -> Gates:
        return Gates(3, self.features, "xavier", self.layer_norm, self.weight_norm)

    @property
    def recurrent(self) -> Gates:
        return Gates(3, self.features, "orthogonal", self.layer_norm, self.weight_norm)

    def init(self, key: Key, inputs: int) -> Params:
        key_inputs, key_recurrent = jax.random.split(key)
        return {
            "inputs": self.inputs.init(key_inputs, inputs),
            "recurrent": self.recurrent.init(key_recurrent, self.features),
        }

    def init_carry(self) -> jax.Array:
        return jnp.zeros(self.features)

    def step(self, params: Params, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        recurrent = self.recurrent.weights(params["recurrent"])
        return self.recur(recurrent, carry, self.inputs(self.inputs.weights(params["inputs"]), x))

    def sequence(self, params: Params, carry: jax.Array, x: jax.Array, reset: jax.Array) -> tuple[jax.Array, jax.Array]:
        recurrent, inputs = self.recurrent.weights(params["recurrent"]), self.inputs.weights(params["inputs"])

        def step(h, now):
            projected, reset = now
            return self.recur(recurrent, jnp.where(reset, self.init_carry(), h), projected)

        # One product over all time steps; only the recurrent one has to wait for its turn.
        return jax.lax.scan(step, carry, (jax.vmap(lambda x: self.inputs(inputs, x))(x), reset))

    def recur(self, recurrent: Params, h: jax.Array, projected: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`projected [3 H]` is `W x`. The new state is the output as well."""
        x_gates, x_n = jnp.split(projected, [2 * self.features])
        h_gates, h_n = jnp.split(self.recurrent(recurrent, h), [2 * self.features])
        r, z = jnp.split(jax.nn.sigmoid(x_gates + h_gates), 2)
        n = ACTIVATIONS[self.activation](x_n + r * h_n)
        h = (1 - z) * n + z * h
        return h, h


class GRUSettings(MemorySettings):
    features: int = setting("size of the state", unit="units", ge=1)
    activation: Activation = setting("of the candidate for the new state")
    layer_norm: bool = setting("normalise each gate's sums over its units")
    weight_norm: bool = setting("normalise each unit's weights and learn their length")

    def build(self, length: int) -> GRU:
        return GRU(self.features, self.activation, self.layer_norm, self.weight_norm)
