"""Bernoulli bandits (Duan et al. 2016, section 3.1): one pull is one episode, the observation is constant."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams, EnvState

from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.settings import FamilySettings, setting
from metarl_cli.core.types import Batch, BernoulliArms, Key, pytree, static


@pytree
class BanditParams(EnvParams):
    """One task: the success probability of each arm."""

    probability: jax.Array  # [k]
    max_steps_in_episode: Any = 1


@pytree
class BanditState(EnvState):
    time: Any  # [] int


class BanditEnv(Environment[BanditState, BanditParams]):
    """k arms; the pull ends the episode by its time limit of one step."""

    def __init__(self, k: int):
        self.k = k

    @property
    def default_params(self) -> BanditParams:
        return BanditParams(probability=jnp.full(self.k, 0.5))

    @property
    def num_actions(self) -> int:
        return self.k

    def reset_env(self, key, params):
        return jnp.zeros(1), BanditState(time=jnp.zeros((), int))

    def step_env(self, key, state, action, params):
        reward = jax.random.bernoulli(key, params.probability[action]).astype(float)
        return jnp.zeros(1), BanditState(time=state.time + 1), reward, jnp.zeros((), bool), {}

    def is_terminated(self, state, params):
        return jnp.zeros((), bool)

    def action_space(self, params):
        return spaces.Discrete(self.k)

    def observation_space(self, params):
        return spaces.Box(0.0, 0.0, (1,), dtype=jnp.float32)


@pytree
class Bandit(TaskFamily):
    """Probabilities independent and uniform on [0, 1]; in `ood` one arm pays with 0.55, the others with 0.45."""

    episodes: int = static()  # n
    env: BanditEnv = static()
    prior: BernoulliArms = static()
    horizon: int = static(default=1)
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> BanditParams:
        if split == "ood":
            probability = jnp.full(self.env.k, 0.45).at[jax.random.randint(key, (), 0, self.env.k)].set(0.55)
        else:
            probability = jax.random.uniform(key, (self.env.k,))
        return BanditParams(probability=probability, max_steps_in_episode=1)

    def fixed(self, split: str) -> None:
        return None

    def oracle(self, task: Any, state: Any) -> jax.Array:
        return jnp.argmax(task.probability)

    def expected(self, task: Any, state: Any, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        return task.probability[action], jnp.max(task.probability)

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        """Success probability of each arm, and how often it was pulled."""
        arms = np.arange(1, self.env.k + 1)
        share = np.bincount(batch.action[batch.valid], minlength=self.env.k) / max(1, batch.valid.sum())
        axes.bar(arms, task.probability, width=0.8, color="0.86", label="success probability")
        axes.bar(arms, share, width=0.4, color="C0", label="share of pulls")
        axes.set(xlabel="arm", xticks=arms, ylim=(0, 1))


class BanditSettings(FamilySettings):
    k: int = setting("arms", ge=2)
    n: int = setting("pulls per trial", unit="pulls", ge=1)

    def build(self) -> Bandit:
        return Bandit(episodes=self.n, env=BanditEnv(self.k), prior=BernoulliArms(self.k))
