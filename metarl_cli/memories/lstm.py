"""Long short-term memory (Hochreiter and Schmidhuber 1997), with forget gates (Gers et al. 2000) that start open.

i, f, o = sigmoid(W x + U h),   g = tanh(W_g x + U_g h),   c' = f c + i g,   h' = o tanh(c')

The bias of f starts at 1 (Jozefowicz et al. 2015); weights start as the GRU's do. With layer normalisation each of the eight
products is normalised over its gate, and c' before its tanh (Ba et al. 2016); with weight normalisation each unit's weights
are (Salimans and Kingma 2016).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from metarl_cli.core.memory import Memory, MemorySettings
from metarl_cli.core.networks import Gates, normalise
from metarl_cli.core.settings import setting
from metarl_cli.core.types import Key, Params

State = tuple[jax.Array, jax.Array]  # c, h


@dataclass(frozen=True)
class LSTM(Memory):
    features: int
    layer_norm: bool = False
    weight_norm: bool = False

    @property
    def inputs(self) -> Gates:
        return Gates(4, self.features, "xavier", self.layer_norm, self.weight_norm)

    @property
    def recurrent(self) -> Gates:
        return Gates(4, self.features, "orthogonal", self.layer_norm, self.weight_norm)

    def init(self, key: Key, inputs: int) -> Params:
        key_inputs, key_recurrent = jax.random.split(key)
        params = {
            "inputs": self.inputs.init(key_inputs, inputs),
            "recurrent": self.recurrent.init(key_recurrent, self.features),
        }
        i, f, g, o = jnp.split(params["inputs"]["bias"], 4)
        params["inputs"]["bias"] = jnp.concatenate([i, f + 1, g, o])
        if self.layer_norm:
            params["cell"] = {"scale": jnp.ones(self.features), "bias": jnp.zeros(self.features)}
        return params

    def init_carry(self) -> State:
        return jnp.zeros(self.features), jnp.zeros(self.features)

    def step(self, params: Params, carry: State, x: jax.Array) -> tuple[State, jax.Array]:
        recurrent = self.recurrent.weights(params["recurrent"])
        projected = self.inputs(self.inputs.weights(params["inputs"]), x)
        return self.recur(recurrent, params.get("cell"), carry, projected)

    def sequence(self, params: Params, carry: State, x: jax.Array, reset: jax.Array) -> tuple[State, jax.Array]:
        recurrent, inputs = self.recurrent.weights(params["recurrent"]), self.inputs.weights(params["inputs"])

        def step(carry, now):
            projected, reset = now
            carry = jax.tree.map(lambda start, x: jnp.where(reset, start, x), self.init_carry(), carry)
            return self.recur(recurrent, params.get("cell"), carry, projected)

        return jax.lax.scan(step, carry, (jax.vmap(lambda x: self.inputs(inputs, x))(x), reset))

    def recur(self, recurrent: Params, cell: Params, carry: State, projected: jax.Array) -> tuple[State, jax.Array]:
        """`projected [4 H]` is `W x`, in the order i, f, g, o."""
        c, h = carry
        i, f, g, o = jnp.split(projected + self.recurrent(recurrent, h), 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        out = normalise(c) * cell["scale"] + cell["bias"] if self.layer_norm else c
        h = jax.nn.sigmoid(o) * jnp.tanh(out)
        return (c, h), h


class LSTMSettings(MemorySettings):
    features: int = setting("size of the state", unit="units", ge=1)
    layer_norm: bool = setting("normalise each gate's sums over its units")
    weight_norm: bool = setting("normalise each unit's weights and learn their length")

    def build(self, length: int) -> LSTM:
        return LSTM(self.features, self.layer_norm, self.weight_norm)
