"""Two arms that pay with p_t and 1 - p_t, where p_t drifts, slowly in some tasks and fast in others (Wang et al. 2016,
section 3.1.4).

The drift does not wait for a learner, so it is part of the task, which holds p_t for every pull; and since a reset would
set the clock back, a trial is one episode of n pulls here, not n episodes of one pull as on other bandits. Further episodes
go through the same drift again.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments.environment import EnvParams

from metarl_cli.core.arms import ArmsEnv, bernoulli
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.settings import FamilySettings, Fractions, setting
from metarl_cli.core.types import Batch, Key, RestlessArms, pytree, static


@pytree
class RestlessBanditParams(EnvParams):
    """One task: the success probability of the first arm at each pull; the second one's is 1 minus it."""

    probability: jax.Array  # [n]
    volatility: jax.Array  # [], standard deviation of a step of the drift; the environment does not read it
    max_steps_in_episode: Any = 100


def probabilities(task: RestlessBanditParams, time: jax.Array) -> jax.Array:
    p = task.probability[time]
    return jnp.stack([p, 1 - p])


def pull(key: Key, task: RestlessBanditParams, time: jax.Array, action: jax.Array) -> jax.Array:
    return bernoulli(key, probabilities(task, time)[action])


@pytree
class RestlessBandit(TaskFamily):
    """A Gaussian random walk, reflected at 0 and 1; in `ood` its volatilities are others."""

    horizon: int = static()  # n
    env: ArmsEnv = static()
    prior: RestlessArms = static()
    ood_volatilities: tuple[float, ...] = static()
    episodes: int = static(default=1)
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> RestlessBanditParams:
        key_volatility, key_start, key_steps = jax.random.split(key, 3)
        volatilities = self.ood_volatilities if split == "ood" else self.prior.volatilities
        volatility = jax.random.choice(key_volatility, jnp.array(volatilities, float))
        steps = volatility * jax.random.normal(key_steps, (self.horizon - 1,))
        free = jnp.cumsum(jnp.concatenate([jax.random.uniform(key_start, (1,)), steps]))
        probability = 1 - jnp.abs(1 - jnp.mod(free, 2))  # folded into [0, 1]: what reflection makes of a free walk
        return RestlessBanditParams(probability=probability, volatility=volatility, max_steps_in_episode=self.horizon)

    def fixed(self, split: str) -> None:
        return None

    def oracle(self, task: Any, state: Any) -> jax.Array:
        return jnp.argmax(probabilities(task, state.time))

    def expected(self, task: Any, state: Any, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        means = probabilities(task, state.time)
        return means[action], jnp.max(means)

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        """How the probability drifts, and how often the first arm was pulled at each time."""
        pulls = np.arange(1, self.horizon + 1)
        first = np.mean(batch.action == 0, axis=0)
        axes.plot(pulls, task.probability, color="0.6", label="success probability of arm 1")
        label = "pulled (1) or not (0)" if len(batch.action) == 1 else "share of episodes that pulled it"
        axes.plot(pulls, first, ".", color="C0", markersize=3, label=label)
        axes.set(xlabel="pull", ylim=(-0.05, 1.05), yticks=[0, 0.5, 1])


class RestlessBanditSettings(FamilySettings):
    n: int = setting("pulls per trial, which is one episode", unit="pulls", ge=2)
    volatilities: Fractions = setting(
        "standard deviations of a step of the drift, of which each task has one", unit="per pull", min_length=1
    )
    ood_volatilities: Fractions = setting("those of the split `ood`", unit="per pull", min_length=1)

    def build(self) -> RestlessBandit:
        return RestlessBandit(
            horizon=self.n,
            env=ArmsEnv(2, pull),
            prior=RestlessArms(self.n, self.volatilities),
            ood_volatilities=self.ood_volatilities,
        )
