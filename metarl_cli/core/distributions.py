"""The two action distributions, as pytrees. Leading axes are batch axes; log-probabilities are in nats.

`fisher` multiplies a tangent of the distribution's own parameters by its Fisher matrix in these parameters: the Hessian H
of `KL(p || q)` at q = p. With the Jacobian J of a network's outputs, `J^T H J` is the Fisher matrix of its parameters.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from metarl_cli.core.types import Key

LOG_2PI = math.log(2 * math.pi)


class Categorical(NamedTuple):
    """Over n actions."""

    logits: jax.Array  # [..., n], not normalised

    def sample(self, key: Key) -> jax.Array:
        return jax.random.categorical(key, self.logits)

    def mode(self) -> jax.Array:
        return jnp.argmax(self.logits, axis=-1)

    def log_prob(self, action: jax.Array) -> jax.Array:
        chosen = jax.nn.one_hot(action, self.logits.shape[-1], dtype=self.logits.dtype)
        return jnp.sum(chosen * jax.nn.log_softmax(self.logits), axis=-1)

    def entropy(self) -> jax.Array:
        log_p = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    def kl(self, other: Self) -> jax.Array:
        """KL(self || other)."""
        log_p, log_q = jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    def fisher(self, tangent: Self) -> Categorical:
        """(diag(p) - p p^T) v."""
        p = jax.nn.softmax(self.logits)
        pv = p * tangent.logits
        return Categorical(pv - p * jnp.sum(pv, axis=-1, keepdims=True))


class DiagonalGaussian(NamedTuple):
    """Over A independent components."""

    mean: jax.Array  # [..., A]
    log_std: jax.Array  # [..., A]

    def sample(self, key: Key) -> jax.Array:
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def mode(self) -> jax.Array:
        return self.mean

    def log_prob(self, action: jax.Array) -> jax.Array:
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return -0.5 * jnp.sum(z * z + 2 * self.log_std + LOG_2PI, axis=-1)

    def entropy(self) -> jax.Array:
        return jnp.sum(self.log_std + 0.5 * (1 + LOG_2PI), axis=-1)

    def kl(self, other: Self) -> jax.Array:
        """KL(self || other)."""
        ratio = jnp.exp(2 * (self.log_std - other.log_std))
        z = (self.mean - other.mean) * jnp.exp(-other.log_std)
        return 0.5 * jnp.sum(ratio + z * z - 1 - jnp.log(ratio), axis=-1)

    def fisher(self, tangent: Self) -> DiagonalGaussian:
        """(v_mean / sigma^2, 2 v_log_std)."""
        return DiagonalGaussian(tangent.mean * jnp.exp(-2 * self.log_std), 2 * tangent.log_std)


Distribution = Categorical | DiagonalGaussian
