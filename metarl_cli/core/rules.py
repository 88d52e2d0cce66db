"""How the inner loop makes a step of a gradient: the optimisers of optax, and two that are learned.

The learned ones are small recurrent networks that run once for each number that adapts, with shared weights and a memory of
its own; their meta-parameters are a part of theta. The gradient x that they look at is preprocessed (Andrychowicz et al.
2016, appendix A), with p = 10, and nothing is differentiated through what they look at:

    (log|x| / p, sign x)    where |x| >= e^-p,    else    (-1, e^p x)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from metarl_cli.core.networks import CoordinateNetwork
from metarl_cli.core.types import Key, Params

P = 10.0
OPEN = 6.0  # the forget gate starts at sigmoid(6) = 0.9975


class Rule(ABC):
    """From a gradient to a step. A rule is static; its meta-parameters and its memory are pytrees."""

    @abstractmethod
    def init(self, key: Key) -> Params:
        """Meta-parameters; None where there is nothing to learn."""

    @abstractmethod
    def start(self, params: Params, moving: Params) -> Any:
        """The memory before the first step."""

    @abstractmethod
    def step(
        self, params: Params, memory: Any, moving: Params, gradient: Params, loss: jax.Array, lr: Params
    ) -> tuple[Params, Any]:
        """What adapts after a step, and the memory. `lr` is the step alpha of each number."""


@dataclass(frozen=True)
class Optax(Rule):
    """`theta' = theta - alpha d`, with d the gradient or Adam's direction."""

    name: Literal["sgd", "adam"] = "sgd"

    @property
    def transform(self) -> optax.GradientTransformation:
        # Without `eps_root` the derivative of a root at 0 makes the meta-gradient NaN.
        return optax.scale_by_adam(eps_root=1e-8) if self.name == "adam" else optax.identity()

    def init(self, key: Key) -> None:
        return None

    def start(self, params: Params, moving: Params) -> optax.OptState:
        return self.transform.init(moving)

    def step(
        self, params: Params, memory: Any, moving: Params, gradient: Params, loss: jax.Array, lr: Params
    ) -> tuple[Params, Any]:
        direction, memory = self.transform.update(gradient, memory)
        return jax.tree.map(lambda p, lr, d: p - lr * d, moving, lr, direction), memory


@dataclass(frozen=True)
class MetaLSTM(Rule):
    """The cell state of an LSTM is the parameter (Ravi & Larochelle 2017, section 3).

        theta' = f theta - i grad L,    f = sigmoid(z_f),    i = 2 alpha sigmoid(z_i)

    z comes from a common LSTM over the preprocessed gradient and loss, theta, and both gates of the step before (in the
    paper each gate sees its own). The initial cell state is theta, as in MAML. In the paper i is within (0, 1); the steps of
    policy gradients need not be, so here it is in units of alpha. Their gradient is a constant for the meta-gradient, here
    only with `first_order`.
    """

    units: int

    @property
    def network(self) -> CoordinateNetwork:
        return CoordinateNetwork(self.units, layers=1, outputs=2, scale=0.01)

    def init(self, key: Key) -> Params:
        return self.network.init(key, inputs=4, beside=3)

    def start(self, params: Params, moving: Params) -> Any:
        flat, _ = ravel_pytree(moving)
        return self.network.start(params, flat.size), jnp.ones((flat.size, 2), flat.dtype)

    def step(
        self, params: Params, memory: Any, moving: Params, gradient: Params, loss: jax.Array, lr: Params
    ) -> tuple[Params, Any]:
        carry, gates = memory
        theta, unravel = ravel_pytree(moving)
        gradient, lr = ravel_pytree(gradient)[0], ravel_pytree(lr)[0]
        x = jnp.concatenate([preprocess(gradient), jnp.broadcast_to(preprocess(loss), (theta.size, 2))], axis=-1)
        carry, z = self.network.step(params, carry, x, jnp.concatenate([theta[:, None], gates], axis=-1))
        forget, enter = jax.nn.sigmoid(z[:, 0] + OPEN), 2 * jax.nn.sigmoid(z[:, 1])
        return unravel(forget * theta - lr * enter * gradient), (carry, jnp.stack([forget, enter], axis=-1))


@dataclass(frozen=True)
class Recurrent(Rule):
    """A recurrent network's output is the step (Andrychowicz et al. 2016, section 2.1): `theta' = theta - alpha m(grad L)`.

    Two layers of LSTM, as in the paper, where theta is random; here it is learned, as in MAML. There the loss after each
    step counts, here the one after the last. Nothing in a step depends on the gradient's size: alpha is that of a step, 0.1
    in the paper, and a tenth of it for a policy of thousands of numbers.
    """

    units: int

    @property
    def network(self) -> CoordinateNetwork:
        return CoordinateNetwork(self.units, layers=2, outputs=1, scale=0.01)

    def init(self, key: Key) -> Params:
        return self.network.init(key, inputs=2, beside=0)

    def start(self, params: Params, moving: Params) -> Any:
        return self.network.start(params, ravel_pytree(moving)[0].size)

    def step(
        self, params: Params, memory: Any, moving: Params, gradient: Params, loss: jax.Array, lr: Params
    ) -> tuple[Params, Any]:
        theta, unravel = ravel_pytree(moving)
        x = preprocess(ravel_pytree(gradient)[0])
        memory, out = self.network.step(params, memory, x, jnp.zeros((theta.size, 0), theta.dtype))
        return unravel(theta - ravel_pytree(lr)[0] * out[:, 0]), memory


def preprocess(x: jax.Array) -> jax.Array:
    """`[...]` to `[..., 2]`: size and sign of numbers of any magnitude. Nothing is differentiated through it."""
    x = jax.lax.stop_gradient(x)
    large = jnp.abs(x) >= jnp.exp(-P)
    log = jnp.log(jnp.where(large, jnp.abs(x), 1)) / P
    return jnp.stack([jnp.where(large, log, -1), jnp.where(large, jnp.sign(x), jnp.exp(P) * x)], axis=-1)
