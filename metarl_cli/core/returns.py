"""Returns and advantages of padded batches, time last: `[..., T]`. Only meta-gradients are taken through them."""

from __future__ import annotations

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from metarl_cli.core.types import Batch, Trial


def discounted(x: jax.Array, decay: jax.Array) -> jax.Array:
    """`y_t = x_t + decay_t y_{t+1}`, with `y_T = 0`; both `[..., T]`."""

    def step(later, now):
        y = now[0] + now[1] * later
        return y, y

    first = jnp.moveaxis(x, -1, 0), jnp.moveaxis(decay, -1, 0)
    _, y = jax.lax.scan(step, jnp.zeros_like(first[0][0]), first, reverse=True)
    return jnp.moveaxis(y, 0, -1)


def gae(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    done: jax.Array,
    gamma: float | jax.Array,
    lam: float | jax.Array,
) -> jax.Array:
    """Generalised advantage estimates (Schulman et al. 2016, equation 16), all `[..., T]`.

    `delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)` and
    `A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}`.

    Args:
        next_value: V of the observation that the step led to, before any reset: a truncated episode bootstraps from it.
            Give zeros for a finite-horizon return, in which the time limit is part of the task.
        terminated: the step ended the episode by itself, nothing follows.
        done: the estimate does not reach over this step (terminated or truncated; all false inside an RL^2 trial).
    """
    delta = reward + gamma * jnp.where(terminated, 0, next_value) - value
    return discounted(delta, jnp.where(done, 0, gamma * lam).astype(delta.dtype))


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the entries where `mask` holds; 0 if there are none."""
    return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(jnp.sum(mask), 1)


def mean_and_std(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Over the entries where `mask` holds; the standard deviation is never 0, and its derivative never infinite."""
    mean = masked_mean(x, mask)
    return mean, jnp.sqrt(masked_mean((x - mean) ** 2, mask) + 1e-16)


def standardise(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean 0 and standard deviation 1 over the entries where `mask` holds; 0 elsewhere."""
    mean, std = mean_and_std(x, mask)
    return jnp.where(mask, (x - mean) / std, 0)


def episode_returns(batch: Batch) -> jax.Array:
    """Undiscounted return of each episode, `[..., T] -> [...]`."""
    return jnp.sum(jnp.where(batch.valid, batch.reward, 0), axis=-1)


def summed_up(batch: Batch) -> Trial:
    """Episodes `[P, K, T]` as a trial."""
    regret = None if batch.regret is None else jnp.sum(jnp.where(batch.valid, batch.regret, 0), -1)
    return Trial(episode_returns(batch), jnp.sum(batch.valid, -1), regret, batch)


def linear_baseline(observation: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    """The linear feature baseline of Duan et al. 2016, fitted to one task's data and evaluated on it.

    Ridge regression on `[s, s^2, t/100, (t/100)^2, (t/100)^3, 1]`. Its size does not depend on the amount of data: normal
    equations of 2 D + 4 unknowns.

    Args:
        observation: `[K, T, D]`, clipped to 10 as the authors do.
        target: returns `[K, T]`.

    Returns:
        Predicted returns `[K, T]`.
    """
    s = jnp.clip(observation, -10, 10)
    t = jnp.broadcast_to(jnp.arange(target.shape[-1], dtype=s.dtype)[:, None] / 100, (*target.shape, 1))
    features = jnp.concatenate([s, s**2, t, t**2, t**3, jnp.ones_like(t)], axis=-1)
    rows = jnp.where(valid[..., None], features, 0).reshape(-1, features.shape[-1])
    n = jnp.maximum(jnp.sum(valid), 1)
    gram = rows.T @ rows / n
    ridge = jnp.maximum(
        1e-5, jnp.finfo(gram.dtype).eps * jnp.trace(gram)
    )  # features that are constant would make it singular
    gram += ridge * jnp.eye(rows.shape[-1], dtype=rows.dtype)
    weights = jax.scipy.linalg.solve(gram, rows.T @ target.reshape(-1) / n, assume_a="pos")
    return features @ weights


class RunningStats(NamedTuple):
    """Mean and sum of squared deviations over everything seen so far (Chan et al. 1983)."""

    n: jax.Array
    mean: jax.Array
    m2: jax.Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> Self:
        return cls(jnp.zeros(()), jnp.zeros(shape), jnp.zeros(shape))

    @property
    def std(self) -> jax.Array:
        """1 until there is data."""
        return jnp.where(self.n > 0, jnp.sqrt(self.m2 / jnp.maximum(self.n, 1)) + 1e-8, 1)

    def update(self, x: jax.Array, mask: jax.Array) -> Self:
        """`x [..., *shape]`, `mask [...]`."""
        axes = tuple(range(mask.ndim))
        weight = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)).astype(x.dtype)
        count = jnp.sum(mask).astype(x.dtype)
        mean = jnp.sum(weight * x, axes) / jnp.maximum(count, 1)
        m2 = jnp.sum(weight * (x - jnp.broadcast_to(mean, x.shape)) ** 2, axes)
        total = jnp.maximum(self.n + count, 1)
        delta = mean - self.mean
        return type(self)(
            self.n + count,
            self.mean + delta * count / total,
            self.m2 + m2 + delta**2 * self.n * count / total,
        )


class Normaliser(NamedTuple):
    """Running normalisation of what a learner sees; a part of its state, frozen during an evaluation.

    A member is `None` where it is switched off. Rewards are divided by the standard deviation of the discounted return so
    far, not centred: a constant added to each reward is a part of the task.
    """

    observation: RunningStats | None
    reward: RunningStats | None

    @classmethod
    def create(cls, size: int, observations: bool, rewards: bool) -> Self:
        return cls(RunningStats.zeros((size,)) if observations else None, RunningStats.zeros(()) if rewards else None)

    def observe(self, observation: jax.Array) -> jax.Array:
        """`[..., D]`, clipped to 10 standard deviations."""
        if self.observation is None:
            return observation
        mean, std = (jnp.broadcast_to(x, observation.shape) for x in (self.observation.mean, self.observation.std))
        return jnp.clip((observation - mean) / std, -10, 10)

    def scale(self, reward: jax.Array) -> jax.Array:
        return reward if self.reward is None else reward / self.reward.std

    def update(self, batch: Batch, gamma: float | jax.Array) -> Self:
        """With a batch `[..., T]`."""
        observation, reward = self
        if observation is not None:
            observation = observation.update(batch.observation, batch.valid)
        if reward is not None:
            raw = jnp.where(batch.valid, batch.reward, 0)
            so_far = jnp.flip(discounted(jnp.flip(raw, -1), jnp.full_like(raw, gamma)), -1)
            reward = reward.update(so_far, batch.valid)
        return type(self)(observation, reward)
