"""Policy and value networks behind `init` and `apply`. Parameters are `{"body": ..., "head": ...}`.

With `memories/`, the only place that knows flax, whose layers are float32 unless `param_dtype=float` leaves it to JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from metarl_cli.core.distributions import Categorical, DiagonalGaussian, Distribution
from metarl_cli.core.memory import Memory
from metarl_cli.core.rollout import Spaces
from metarl_cli.core.types import Key, Params, Previous

Activation = Literal["tanh", "relu"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"tanh": jnp.tanh, "relu": nn.relu}
MIN_LOG_STD = jnp.log(1e-6).item()  # the floor of MAML's authors


def run(module: nn.Module, params: Params, *args: Any) -> Any:
    """`module.apply` without its other return types."""
    return module.apply(params, *args)


class MLP(nn.Module):
    """Dense layers with an activation after each."""

    widths: tuple[int, ...]
    activation: Activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = ACTIVATIONS[self.activation](
                nn.Dense(width, kernel_init=nn.initializers.xavier_uniform(), param_dtype=float)(x)
            )
        return x


class PolicyHead(nn.Module):
    """Features to a distribution over actions: a linear layer, and a standard deviation that no state changes."""

    spec: Spaces
    scale: float  # of the initial weights; small ones start close to a uniform policy

    @nn.compact
    def __call__(self, x: jax.Array) -> Distribution:
        init = nn.initializers.variance_scaling(self.scale, "fan_avg", "uniform")
        outputs = nn.Dense(self.spec.action, kernel_init=init, param_dtype=float)(x)
        if self.spec.discrete:
            return Categorical(outputs)
        log_std = self.param("log_std", nn.initializers.zeros, (self.spec.action,), outputs.dtype)
        return DiagonalGaussian(outputs, jnp.broadcast_to(jnp.maximum(log_std, MIN_LOG_STD), outputs.shape))


class ValueHead(nn.Module):
    """Features to a value."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1, kernel_init=nn.initializers.xavier_uniform(), param_dtype=float)(x)[..., 0]


@dataclass(frozen=True)
class Policy:
    """A feed-forward policy: an MLP and a head.

    With a `context` of C numbers its input is `[s, phi]`; phi is the parameter `"context"`, which `init` leaves out.
    """

    spec: Spaces
    widths: tuple[int, ...]
    activation: Activation
    context: int = 0

    @property
    def body(self) -> MLP:
        return MLP(self.widths, self.activation)

    @property
    def head(self) -> PolicyHead:
        return PolicyHead(self.spec, scale=1.0)

    def init(self, key: Key) -> Params:
        key_body, key_head = jax.random.split(key)
        inputs = jnp.zeros(self.spec.observation + self.context)
        body = self.body.init(key_body, inputs)
        features = run(self.body, body, inputs)
        return {"body": body, "head": self.head.init(key_head, features)}

    def apply(self, params: Params, observation: jax.Array) -> Distribution:
        """`[..., D]` to a distribution with the same leading axes."""
        inputs = observation
        if self.context:
            context = jnp.broadcast_to(params["context"], (*observation.shape[:-1], self.context))
            inputs = jnp.concatenate([observation, context], axis=-1)
        return run(self.head, params["head"], run(self.body, params["body"], inputs))


@dataclass(frozen=True)
class AgentNetwork:
    """A policy and, in a network of its own, some `outputs`: a value, or the logits of a prediction."""

    policy: Policy
    outputs: int

    @property
    def body(self) -> MLP:
        return MLP(self.policy.widths, self.policy.activation)

    @property
    def head(self) -> nn.Dense:
        return nn.Dense(self.outputs, kernel_init=nn.initializers.xavier_uniform(), param_dtype=float)

    def init(self, key: Key) -> Params:
        key_policy, key_body, key_head = jax.random.split(key, 3)
        inputs = jnp.zeros(self.policy.spec.observation)
        body = self.body.init(key_body, inputs)
        head = self.head.init(key_head, run(self.body, body, inputs))
        return {"policy": self.policy.init(key_policy), "beside": {"body": body, "head": head}}

    def apply(self, params: Params, observation: jax.Array) -> tuple[Distribution, jax.Array]:
        """`[..., D]` to a distribution and outputs `[..., M]`."""
        beside = params["beside"]
        outputs = run(self.head, beside["head"], run(self.body, beside["body"], observation))
        return self.policy.apply(params["policy"], observation), outputs


class Backward(nn.Module):
    """One step of the rule that reads episodes backwards: features of a step and what is remembered of later ones."""

    units: int
    outputs: int

    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry, h = nn.GRUCell(self.units, param_dtype=float)(carry, x)
        return carry, nn.Dense(self.outputs, param_dtype=float)(h)


@dataclass(frozen=True)
class BackwardNetwork:
    """The network of LPG (Oh et al. 2020, figure 1): of predictions of M categories it makes two kinds of targets."""

    predictions: int
    units: int
    embedding: int

    @property
    def embed(self) -> nn.Sequential:
        return nn.Sequential([nn.Dense(self.embedding, param_dtype=float), jnp.tanh, nn.Dense(1, param_dtype=float)])

    @property
    def backward(self) -> Backward:
        return Backward(self.units, 1 + self.predictions)

    def init(self, key: Key) -> Params:
        key_embed, key_backward = jax.random.split(key)
        embed = self.embed.init(key_embed, jnp.zeros(self.predictions))
        return {"embed": embed, "backward": self.backward.init(key_backward, jnp.zeros(self.units), jnp.zeros(6))}

    def apply(self, params: Params, steps: jax.Array, y: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Targets `[K, T]` and `[K, T, M]` from what happened, `[K, T, 4]`, and the predictions `[K, T, M]`.

        Args:
            end: nothing is remembered, and no prediction of the next state is seen, over such a step.
        """
        now = run(self.embed, params["embed"], y)
        after = jnp.concatenate([now[:, 1:], jnp.zeros_like(now[:, :1])], axis=1)
        x = jnp.concatenate([steps, now, jnp.where(end[..., None], 0, after)], axis=-1)

        def step(carry, now):
            x, end = now
            return run(self.backward, params["backward"], jnp.where(end[:, None], 0, carry), x)

        carry = jnp.zeros((y.shape[0], self.units), y.dtype)
        time_first = jnp.moveaxis(x, 1, 0), jnp.moveaxis(end, 1, 0)
        out = jnp.moveaxis(jax.lax.scan(step, carry, time_first, reverse=True)[1], 0, 1)
        return out[..., 0], out[..., 1:]


class Stack(nn.Module):
    """LSTMs on top of each other, one step, and a linear layer on the last and on what stands `beside` it."""

    units: int
    layers: int
    outputs: int
    scale: float  # of the linear layer's initial weights

    @nn.compact
    def __call__(self, carry: list[Any], x: jax.Array, beside: jax.Array) -> tuple[list[Any], jax.Array]:
        new = []
        for c in carry:
            c, x = nn.OptimizedLSTMCell(self.units, param_dtype=float)(c, x)
            new.append(c)
        init = nn.initializers.variance_scaling(self.scale, "fan_avg", "uniform")
        x = jnp.concatenate([x, beside], axis=-1)
        return new, nn.Dense(self.outputs, kernel_init=init, param_dtype=float)(x)


@dataclass(frozen=True)
class CoordinateNetwork:
    """One recurrent network for each of n numbers: shared weights, a carry for each, and a learned first carry."""

    units: int
    layers: int
    outputs: int
    scale: float

    @property
    def stack(self) -> Stack:
        return Stack(self.units, self.layers, self.outputs, self.scale)

    def init(self, key: Key, inputs: int, beside: int) -> Params:
        key_start, key_weights = jax.random.split(key)
        params = {"start": 0.1 * jax.random.normal(key_start, (self.layers, 2, self.units))}
        weights = self.stack.init(key_weights, self.start(params, 1), jnp.zeros((1, inputs)), jnp.zeros((1, beside)))
        return params | {"weights": weights}

    def start(self, params: Params, n: int) -> list[Any]:
        """Of n numbers."""
        return [tuple(jnp.broadcast_to(x, (n, self.units)) for x in layer) for layer in params["start"]]

    def step(self, params: Params, carry: list[Any], x: jax.Array, beside: jax.Array) -> tuple[list[Any], jax.Array]:
        """`x [n, D]` to outputs `[n, M]`."""
        return run(self.stack, params["weights"], carry, x, beside)


@dataclass(frozen=True)
class RecurrentActorCritic:
    """A memory with a policy head and a value head on its features.

    The input of a step is `[s_t, a_{t-1} (one-hot if discrete), r_{t-1}, done_{t-1}]` (Duan et al. 2016, section 2.2).
    """

    spec: Spaces
    memory: Memory

    @property
    def policy_head(self) -> PolicyHead:
        return PolicyHead(self.spec, scale=0.01)

    @property
    def value_head(self) -> ValueHead:
        return ValueHead()

    def init(self, key: Key) -> Params:
        key_memory, key_policy, key_value = jax.random.split(key, 3)
        features = jnp.zeros(self.memory.features)
        return {
            "memory": self.memory.init(key_memory, self.spec.observation + self.spec.action + 2),
            "policy": self.policy_head.init(key_policy, features),
            "value": self.value_head.init(key_value, features),
        }

    def inputs(self, observation: jax.Array, previous: Previous) -> jax.Array:
        """`[..., D]` and the previous step to `[..., D + A + 2]`; an action beyond the box is told as carried out."""
        if self.spec.discrete:
            action = jax.nn.one_hot(previous.action, self.spec.action, dtype=observation.dtype)
        else:
            action = jnp.clip(previous.action, -1, 1)
        scalars = jnp.stack([previous.reward, previous.done], axis=-1)
        return jnp.concatenate([observation, action, scalars], axis=-1)

    def step(self, params: Params, carry: Any, x: jax.Array) -> tuple[Any, Distribution, jax.Array]:
        """One step while acting: the new carry, the policy and the value."""
        carry, features = self.memory.step(params["memory"], carry, x)
        return carry, *self.heads(params, features)

    def sequence(self, params: Params, x: jax.Array) -> tuple[Distribution, jax.Array]:
        """A whole trial `[T, D]` from a fresh carry: policies and values `[T]`."""
        reset = jnp.zeros(x.shape[0], bool)
        _, features = self.memory.sequence(params["memory"], self.memory.init_carry(), x, reset)
        return self.heads(params, features)

    def heads(self, params: Params, features: jax.Array) -> tuple[Distribution, jax.Array]:
        return run(self.policy_head, params["policy"], features), run(self.value_head, params["value"], features)
