"""Policy and value networks behind `init` and `apply`. Parameters are `{"body": ..., "head": ...}`.

With `memories/`, the only place that knows flax, whose layers are float32 unless `param_dtype=float` leaves it to JAX.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from metarl_cli.core.distributions import Categorical, DiagonalGaussian, Distribution
from metarl_cli.core.memory import Carry, Memory, linear_recurrence
from metarl_cli.core.rollout import Spaces
from metarl_cli.core.types import Key, Params, Previous

Activation = Literal["tanh", "relu"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"tanh": jnp.tanh, "relu": nn.relu}
MIN_LOG_STD = jnp.log(1e-6).item()  # the floor of MAML's authors


def run(module: nn.Module, params: Params, *args: Any) -> Any:
    """`module.apply` without its other return types."""
    return module.apply(params, *args)


def dense(units: int, bias: bool = True) -> nn.Dense:
    return nn.Dense(units, use_bias=bias, kernel_init=nn.initializers.xavier_uniform(), param_dtype=float)


class MLP(nn.Module):
    """Dense layers with an activation after each."""

    widths: tuple[int, ...]
    activation: Activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = ACTIVATIONS[self.activation](dense(width)(x))
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
        return dense(1)(x)[..., 0]


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


# --- building blocks of memories


def orthogonal(key: Key, n: int) -> jax.Array:
    """A random orthogonal matrix `[n, n]`: a Gaussian one, its columns orthonormalised (Gram and Schmidt, each twice).

    Not by LAPACK's QR: several batched ones at once can lock up JAX's threads on the CPU, and every gate wants its own.
    """

    def column(i, q):
        earlier = jnp.where(jnp.arange(n) < i, q, 0)
        v = q[:, i]
        for _ in range(2):
            v = v - earlier @ (v @ earlier)
        return q.at[:, i].set(v / jnp.linalg.norm(v))

    return jax.lax.fori_loop(0, n, column, jax.random.normal(key, (n, n)))


def normalise(x: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 over the last axis."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


@dataclass(frozen=True)
class Gates:
    """`W x + b` for some gates at once, `[D]` to `[gates * units]`; each gate's weights are initialised by themselves.

    Used in three steps, so that what does not depend on x is done once for a sequence: `init`, `weights`, call.
    """

    gates: int
    units: int
    initial: Literal["xavier", "orthogonal"]
    layer_norm: bool = False  # of each gate's sums over its units (Ba et al. 2016)
    weight_norm: bool = False  # w = g v / |v| for each unit (Salimans and Kingma 2016), g at first 1

    def init(self, key: Key, inputs: int) -> Params:
        keys = jax.random.split(key, self.gates)
        if self.initial == "orthogonal":
            kernels = jax.vmap(lambda key: orthogonal(key, self.units))(keys)
        else:
            kernels = jax.vmap(lambda key: nn.initializers.xavier_uniform()(key, (inputs, self.units)))(keys)
        total = self.gates * self.units
        params = {"kernel": jnp.moveaxis(kernels, 0, 1).reshape(inputs, total), "bias": jnp.zeros(total)}
        if self.weight_norm:
            params["length"] = jnp.ones(total)
        if self.layer_norm:
            params["scale"] = jnp.ones(total)
        return params

    def weights(self, params: Params) -> Params:
        """The parameters, weight normalisation applied."""
        if not self.weight_norm:
            return params
        kernel = params["kernel"]
        return params | {"kernel": kernel * (params["length"] / jnp.linalg.norm(kernel, axis=0))[None]}

    def __call__(self, weights: Params, x: jax.Array) -> jax.Array:
        y = x @ weights["kernel"]
        if self.layer_norm:
            y = normalise(y.reshape(self.gates, self.units)).reshape(-1) * weights["scale"]
        return y + weights["bias"]


class Mixture(nn.Module):
    """What follows the recurrence of a layer: `x + (W y) sigmoid(V y)`, y its output after a GELU.

    As in LRU (Orvieto et al. 2023, figure 1); S5 (Smith et al. 2023) gates y itself, with one matrix instead of two.
    """

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + nn.glu(dense(2 * x.shape[-1])(nn.gelu(y)))


def mix(params: Params, x: jax.Array, y: jax.Array) -> Any:
    return Mixture().apply(params, x, y)


@dataclass(frozen=True)
class LinearMemory(Memory):
    """Layers around a linear recurrence `h_t = a_t h_{t-1} + b_t` whose a and b see the input alone: parallel in time.

    A linear layer brings the input to F features. Each layer after it is layer normalisation, the recurrence, a gated linear
    unit and a residual connection, as in S5 and LRU. A subclass gives the recurrence.
    """

    features: int  # F
    layers: int

    @abstractmethod
    def init_recurrence(self, key: Key) -> Params:
        """The parameters of one layer's recurrence."""

    @abstractmethod
    def init_state(self) -> jax.Array:
        """h before the first step, zeros `[N]`, real or complex."""

    @abstractmethod
    def coefficients(self, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """a and b `[N]` of one step with the input `x [F]`."""

    @abstractmethod
    def output(self, params: Params, h: jax.Array, x: jax.Array) -> jax.Array:
        """What a layer's recurrence gives out, `[F]`."""

    @property
    def encoder(self) -> nn.Dense:
        return dense(self.features)

    @property
    def norm(self) -> nn.LayerNorm:
        return nn.LayerNorm(param_dtype=float)

    def init(self, key: Key, inputs: int) -> Params:
        key_encoder, key_layers = jax.random.split(key)
        x = jnp.zeros(self.features)

        def layer(key):
            key_recurrence, key_mixed = jax.random.split(key)
            return {
                "norm": self.norm.init(key, x),
                "recurrence": self.init_recurrence(key_recurrence),
                "mixed": Mixture().init(key_mixed, x, x),
            }

        layers = [layer(key) for key in jax.random.split(key_layers, self.layers)]
        return {"encoder": self.encoder.init(key_encoder, jnp.zeros(inputs)), "layers": layers}

    def init_carry(self) -> list[jax.Array]:
        return [self.init_state() for _ in range(self.layers)]

    def step(self, params: Params, carry: list[jax.Array], x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        x = run(self.encoder, params["encoder"], x)
        new = []
        for layer, h in zip(params["layers"], carry, strict=True):
            u = run(self.norm, layer["norm"], x)
            a, b = self.coefficients(layer["recurrence"], u)
            h = a * h + b
            x = mix(layer["mixed"], x, self.output(layer["recurrence"], h, u))
            new.append(h)
        return new, x

    def sequence(
        self, params: Params, carry: list[jax.Array], x: jax.Array, reset: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        x = run(self.encoder, params["encoder"], x)
        new = []
        for layer, start in zip(params["layers"], carry, strict=True):
            p = layer["recurrence"]
            u = run(self.norm, layer["norm"], x)
            a, b = jax.vmap(lambda u, p=p: self.coefficients(p, u))(u)
            h = linear_recurrence(a, b, start, reset)
            x = mix(layer["mixed"], x, jax.vmap(lambda h, u, p=p: self.output(p, h, u))(h, u))
            new.append(h[-1])
        return new, x


# --- the network of memory-based learners

Critic = Literal["shared", "separate", "none"]


class Actor(nn.Module):
    """Hidden layers and a policy head that starts close to uniform."""

    spec: Spaces
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> Distribution:
        return PolicyHead(self.spec, scale=0.01)(MLP(self.widths, "tanh")(x))


@dataclass(frozen=True)
class Hypernetwork:
    """A policy on the state all of whose weights are generated from the features (Beck et al. 2022, 2023).

    features -> linear, `embedding` numbers -> linear, the weights. Bias-HyperInit: the last layer's kernel starts at 0 and
    its bias at an initialisation of the policy, which is then what it generates for every input.
    """

    actor: Actor
    state: int  # D, what the policy sees
    embedding: int

    @property
    def encoder(self) -> nn.Dense:
        return dense(self.embedding)

    def init(self, key: Key, features: jax.Array) -> Params:
        key_actor, key_encoder = jax.random.split(key)
        flat, _ = ravel_pytree(self.actor.init(key_actor, jnp.zeros(self.state)))
        return {
            "encoder": self.encoder.init(key_encoder, features),
            "weights": {"kernel": jnp.zeros((self.embedding, flat.size)), "bias": flat},
        }

    def generate(self, params: Params, features: jax.Array) -> Params:
        """The policy's parameters from one step's features `[H]`."""
        last = params["weights"]
        flat = run(self.encoder, params["encoder"], features) @ last["kernel"] + last["bias"]
        shapes = jax.eval_shape(self.actor.init, jax.random.key(0), jnp.zeros(self.state))
        _, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
        return unravel(flat)

    def apply(self, params: Params, features: jax.Array, state: jax.Array) -> Distribution:
        """`[..., H]` and `[..., D]` to a distribution with the same leading axes."""
        if features.ndim > 1:
            return jax.vmap(self.apply, in_axes=(None, 0, 0))(params, features, state)
        return run(self.actor, self.generate(params, features), state)


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
    """A memory with a policy and a value on its features.

    The input of a step is `[s_t, a_{t-1} (one-hot if discrete), r_{t-1}, done_{t-1}]` (Duan et al. 2016, section 2.2), and
    with `length` the share of the trial that is over.
    """

    spec: Spaces
    memory: Memory
    critic: Critic = "shared"  # which memory the value reads: the policy's, one of its own, or there is no value (0)
    widths: tuple[int, ...] = ()  # of the policy's hidden layers
    sees_state: bool = False  # policy and value see s_t beside the memory's features
    length: int | None = None  # steps of a trial, where the time is a part of the input
    embedding: int | None = None  # of the hypernetwork that generates the policy, where there is one

    @property
    def actor(self) -> Actor | Hypernetwork:
        actor = Actor(self.spec, self.widths)
        return actor if self.embedding is None else Hypernetwork(actor, self.spec.observation, self.embedding)

    @property
    def value_head(self) -> ValueHead:
        return ValueHead()

    def init(self, key: Key) -> Params:
        key_memory, key_policy, key_value, key_critic = jax.random.split(key, 4)
        inputs = self.spec.observation + self.spec.action + 2 + (self.length is not None)
        features = jnp.zeros(self.memory.features)
        with_state = jnp.zeros(self.memory.features + self.sees_state * self.spec.observation)
        params = {
            "memory": self.memory.init(key_memory, inputs),
            "policy": self.actor.init(key_policy, with_state if self.embedding is None else features),
        }
        if self.critic != "none":
            params["value"] = self.value_head.init(key_value, with_state)
        if self.critic == "separate":
            params["critic"] = self.memory.init(key_critic, inputs)
        return params

    def inputs(self, observation: jax.Array, previous: Previous, time: jax.Array) -> jax.Array:
        """`[..., D]`, the previous step and the step's index to `[..., D + A + 2 (+ 1)]`.

        An action beyond the box is told as carried out.
        """
        if self.spec.discrete:
            action = jax.nn.one_hot(previous.action, self.spec.action, dtype=observation.dtype)
        else:
            action = jnp.clip(previous.action, -1, 1)
        scalars = [previous.reward, previous.done]
        if self.length is not None:
            scalars.append(jnp.broadcast_to(time / self.length, previous.reward.shape))
        return jnp.concatenate([observation, action, jnp.stack(scalars, axis=-1)], axis=-1)

    @property
    def memories(self) -> tuple[str, ...]:
        """The names of their parameters."""
        return ("memory", "critic") if self.critic == "separate" else ("memory",)

    def init_carry(self) -> Carry:
        return [self.memory.init_carry() for _ in self.memories]

    def step(self, params: Params, carry: Carry, x: jax.Array) -> tuple[Carry, Distribution, jax.Array]:
        """One step while acting: the new carry, the policy and the value."""
        new = [self.memory.step(params[name], c, x) for name, c in zip(self.memories, carry, strict=True)]
        return [c for c, _ in new], *self.heads(params, [features for _, features in new], x)

    def sequence(self, params: Params, x: jax.Array, unroll: int | None = None) -> tuple[Distribution, jax.Array]:
        """A whole trial `[T, D]` from a fresh carry: policies and values `[T]`.

        Args:
            unroll: with it, gradients reach back within segments of so many steps only; it divides T. The carry is handed on
                from one to the next, so that the values are the same. The backward pass keeps one segment at a time.
        """

        def segments(params):
            if unroll is None:
                return self.memory.trial(params, x)

            @partial(jax.checkpoint, prevent_cse=False)  # not needed inside a scan
            def segment(carry, x):
                return self.memory.sequence(params, jax.lax.stop_gradient(carry), x, jnp.zeros(unroll, bool))

            _, features = jax.lax.scan(segment, self.memory.init_carry(), x.reshape(-1, unroll, x.shape[-1]))
            return features.reshape(x.shape[0], -1)

        return self.heads(params, [segments(params[name]) for name in self.memories], x)

    def heads(self, params: Params, features: list[jax.Array], x: jax.Array) -> tuple[Distribution, jax.Array]:
        """`features` of the policy's memory first, of the value's last."""
        state = x[..., : self.spec.observation]

        def see(features):
            return jnp.concatenate([features, state], axis=-1) if self.sees_state else features

        actor = self.actor
        if isinstance(actor, Hypernetwork):
            policy = actor.apply(params["policy"], features[0], state)
        else:
            policy = run(actor, params["policy"], see(features[0]))
        if self.critic == "none":
            return policy, jnp.zeros(x.shape[:-1])
        return policy, run(self.value_head, params["value"], see(features[-1]))
