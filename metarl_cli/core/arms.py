"""What bandits share: the observation is constant, and a step is a pull of one of k arms.

Where the arms stay what they are, one pull is one episode (Duan et al. 2016): `ArmsFamily`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams, EnvState

from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.types import Batch, Key, pytree, static


@pytree
class ArmsState(EnvState):
    time: Any  # [] int


@final
class ArmsEnv(Environment[ArmsState, Any]):
    """k arms. An episode ends by its time limit alone.

    Args:
        pull: `(key, task, time, action) -> reward`.
    """

    def __init__(self, k: int, pull: Callable[[Key, Any, jax.Array, jax.Array], jax.Array]):
        self.k = k
        self.pull = pull

    @property
    def num_actions(self) -> int:
        return self.k

    def reset_env(self, key, params):
        return jnp.zeros(1), ArmsState(time=jnp.zeros((), int))

    def step_env(self, key, state, action, params):
        reward = self.pull(key, params, state.time, jnp.asarray(action))
        return jnp.zeros(1), ArmsState(time=state.time + 1), reward, jnp.zeros((), bool), {}

    def is_terminated(self, state, params):
        return jnp.zeros((), bool)

    def action_space(self, params):
        return spaces.Discrete(self.k)

    def observation_space(self, params):
        return spaces.Box(0.0, 0.0, (1,), dtype=jnp.float32)


@pytree
class ArmsFamily(TaskFamily):
    """Bandits whose arms stay what they are. A trial has as many pulls as `episodes` says."""

    episodes: int = static()
    env: ArmsEnv = static()
    prior: Any = static()
    horizon: int = static(default=1)
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    @abstractmethod
    def sample(self, key: Key, split: str = "train") -> EnvParams: ...

    @abstractmethod
    def means(self, task: Any) -> jax.Array:
        """The mean reward of each arm, `[k]`."""

    @final
    def fixed(self, split: str) -> None:
        return None

    @final
    def oracle(self, task: Any, state: Any) -> jax.Array:
        return jnp.argmax(self.means(task))

    @final
    def expected(self, task: Any, state: Any, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        means = self.means(task)
        return means[action], jnp.max(means)

    @final
    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        """The mean reward of each arm, and how often it was pulled."""
        arms, means = np.arange(1, self.env.k + 1), np.asarray(self.means(task))
        share = np.bincount(batch.action[batch.valid], minlength=self.env.k) / max(1, batch.valid.sum())
        axes.bar(arms, means, width=0.8, color="0.86", label="mean reward")
        axes.scatter(arms, means, s=150 * share, color="C0", clip_on=False, zorder=3, label="pulls (area: their share)")
        axes.set(xlabel="arm", xticks=arms if self.env.k <= 12 else [1, self.env.k])


def bernoulli(key: Key, probability: jax.Array) -> jax.Array:
    """A reward of 1 with this probability, else 0."""
    return jax.random.bernoulli(key, probability).astype(float)
