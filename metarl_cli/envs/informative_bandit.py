"""A bandit with an arm that pays little and tells which other arm pays most (Wang et al. 2016, section 3.1.3).

The best first pull costs reward: no learner that always takes what looks best finds it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from gymnax.environments.environment import EnvParams

from metarl_cli.core.arms import ArmsEnv, ArmsFamily
from metarl_cli.core.settings import FamilySettings, setting
from metarl_cli.core.types import InformativeArms, Key, pytree


@pytree
class InformativeBanditParams(EnvParams):
    """One task: what each arm pays."""

    reward: jax.Array  # [arms + 1], the informative one last
    max_steps_in_episode: Any = 1


def pull(key: Key, task: InformativeBanditParams, time: jax.Array, action: jax.Array) -> jax.Array:
    return task.reward[action]


@pytree
class InformativeBandit(ArmsFamily):
    """The target is any ordinary arm; in `ood` it pays `ood_target`."""

    ood_target: Any

    def sample(self, key: Key, split: str = "train") -> InformativeBanditParams:
        arms = self.prior.arms
        index = jax.random.randint(key, (), 0, arms)
        reward = jnp.full(arms + 1, self.prior.other, float)
        reward = reward.at[index].set(self.ood_target if split == "ood" else self.prior.target)
        return InformativeBanditParams(reward=reward.at[arms].set((index + 1) / arms), max_steps_in_episode=1)

    def means(self, task: InformativeBanditParams) -> jax.Array:
        return task.reward


class InformativeBanditSettings(FamilySettings):
    arms: int = setting("ordinary arms; the informative one comes on top", ge=2)
    n: int = setting("pulls per trial", unit="pulls", ge=1)
    target: float = setting("what the target pays")
    other: float = setting("what any other ordinary arm pays")
    ood_target: float = setting("what the target pays in the split `ood`")

    def build(self) -> InformativeBandit:
        prior = InformativeArms(self.arms, self.target, self.other)
        env = ArmsEnv(self.arms + 1, pull)
        return InformativeBandit(episodes=self.n, env=env, prior=prior, ood_target=self.ood_target)
