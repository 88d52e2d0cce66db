"""Bernoulli bandits (Duan et al. 2016, section 3.1): one pull is one episode, the observation is constant."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from gymnax.environments.environment import EnvParams

from metarl_cli.core.arms import ArmsEnv, ArmsFamily, bernoulli
from metarl_cli.core.settings import FamilySettings, setting
from metarl_cli.core.types import BernoulliArms, Key, pytree


@pytree
class BanditParams(EnvParams):
    """One task: the success probability of each arm."""

    probability: jax.Array  # [k]
    max_steps_in_episode: Any = 1


def pull(key: Key, task: BanditParams, time: jax.Array, action: jax.Array) -> jax.Array:
    return bernoulli(key, task.probability[action])


@pytree
class Bandit(ArmsFamily):
    """Probabilities independent and uniform on [0, 1]; in `ood` one arm pays with 0.55, the others with 0.45."""

    def sample(self, key: Key, split: str = "train") -> BanditParams:
        if split == "ood":
            probability = jnp.full(self.env.k, 0.45).at[jax.random.randint(key, (), 0, self.env.k)].set(0.55)
        else:
            probability = jax.random.uniform(key, (self.env.k,))
        return BanditParams(probability=probability, max_steps_in_episode=1)

    def means(self, task: BanditParams) -> jax.Array:
        return task.probability


class BanditSettings(FamilySettings):
    k: int = setting("arms", ge=2)
    n: int = setting("pulls per trial", unit="pulls", ge=1)

    def build(self) -> Bandit:
        return Bandit(episodes=self.n, env=ArmsEnv(self.k, pull), prior=BernoulliArms(self.k))
