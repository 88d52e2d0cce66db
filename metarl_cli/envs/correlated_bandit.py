"""Two Bernoulli arms that pay with p and 1 - p (Wang et al. 2016, section 3.1.2).

What one arm pays tells as much of the other. With two values of p, even one pull tells which arm is the better one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from gymnax.environments.environment import EnvParams

from metarl_cli.core.arms import ArmsEnv, ArmsFamily, bernoulli
from metarl_cli.core.settings import FamilySettings, Fractions, setting
from metarl_cli.core.types import CorrelatedArms, Key, pytree


@pytree
class CorrelatedBanditParams(EnvParams):
    """One task: the success probability of each arm."""

    probability: jax.Array  # [2]
    max_steps_in_episode: Any = 1


def pull(key: Key, task: CorrelatedBanditParams, time: jax.Array, action: jax.Array) -> jax.Array:
    return bernoulli(key, task.probability[action])


@pytree
class CorrelatedBandit(ArmsFamily):
    """p as the prior has it; in `ood` the arms are independent and uniform on [0, 1], the paper's D_i."""

    def sample(self, key: Key, split: str = "train") -> CorrelatedBanditParams:
        if split == "ood":
            probability = jax.random.uniform(key, (2,))
        else:
            values = self.prior.values
            p = jax.random.uniform(key) if values is None else jax.random.choice(key, jnp.array(values, float))
            probability = jnp.stack([p, 1 - p])
        return CorrelatedBanditParams(probability=probability, max_steps_in_episode=1)

    def means(self, task: CorrelatedBanditParams) -> jax.Array:
        return task.probability


class CorrelatedBanditSettings(FamilySettings):
    values: Fractions | None = setting("what p may be, each as likely; null: all of [0, 1]", min_length=1)
    n: int = setting("pulls per trial", unit="pulls", ge=1)

    def build(self) -> CorrelatedBandit:
        return CorrelatedBandit(episodes=self.n, env=ArmsEnv(2, pull), prior=CorrelatedArms(self.values))
