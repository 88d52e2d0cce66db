"""Gaussian bandits: the testbed of Sutton and Barto (2018, section 2.3), with its moments as parameters."""

from __future__ import annotations

from typing import Any

import jax
from gymnax.environments.environment import EnvParams

from metarl_cli.core.arms import ArmsEnv, ArmsFamily
from metarl_cli.core.settings import FamilySettings, setting
from metarl_cli.core.types import GaussianArms, Key, pytree


@pytree
class GaussianBanditParams(EnvParams):
    """One task: the mean reward of each arm."""

    mean: jax.Array  # [k]
    noise: Any  # [], standard deviation of a reward around its mean
    max_steps_in_episode: Any = 1


def pull(key: Key, task: GaussianBanditParams, time: jax.Array, action: jax.Array) -> jax.Array:
    return task.mean[action] + task.noise * jax.random.normal(key)


@pytree
class GaussianBandit(ArmsFamily):
    """Means independent N(mean, std^2); in `ood` N(mean, ood_std^2)."""

    ood_std: Any

    def sample(self, key: Key, split: str = "train") -> GaussianBanditParams:
        std = self.ood_std if split == "ood" else self.prior.std
        mean = self.prior.mean + std * jax.random.normal(key, (self.env.k,))
        return GaussianBanditParams(mean=mean, noise=self.prior.noise, max_steps_in_episode=1)

    def means(self, task: GaussianBanditParams) -> jax.Array:
        return task.mean


class GaussianBanditSettings(FamilySettings):
    k: int = setting("arms", ge=2)
    n: int = setting("pulls per trial", unit="pulls", ge=1)
    mean: float = setting("mean of the arms' mean rewards")
    std: float = setting("standard deviation of the arms' mean rewards", gt=0)
    noise: float = setting("standard deviation of a reward around its arm's mean", ge=0)
    ood_std: float = setting("what `std` is in the split `ood`", gt=0)

    def build(self) -> GaussianBandit:
        prior = GaussianArms(self.k, self.mean, self.std, self.noise)
        return GaussianBandit(episodes=self.n, env=ArmsEnv(self.k, pull), prior=prior, ood_std=self.ood_std)
