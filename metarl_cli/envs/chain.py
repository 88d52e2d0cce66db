"""A chain whose only reward lies d steps away: the shortest task in which a discount can be wrong.

The illustration of Xu, van Hasselt & Silver (2018, section 3) made learnable for one agent. In each state one of two actions
leads on, which one is the task; the other stays. Each step costs a little, the last one pays and ends the episode. Who
goes on from there sees, k steps away, a value of `gamma^(k-1) reward - cost (1 - gamma^k) / (1 - gamma)`: by staying once it
loses `gamma^(k-1) ((1 - gamma) reward + gamma cost)`. With gamma = 0.5 that is 1e-6 at the start of a chain of 20, so that
the last steps alone are learned.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams, EnvState

from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.settings import FamilySettings, setting
from metarl_cli.core.types import Batch, Key, pytree, static


@pytree
class ChainParams(EnvParams):
    """One task: which action leads on, and the constants of the family."""

    forward: jax.Array  # [d] int
    reward: Any  # [], of the last step
    cost: Any  # [], of any step
    max_steps_in_episode: Any = 100


@pytree
class ChainState(EnvState):
    position: jax.Array  # [] int, 0 to d
    time: Any  # [] int


class ChainEnv(Environment[ChainState, ChainParams]):
    """d + 1 states, observed as one-hot vectors, and two actions."""

    def __init__(self, length: int):
        self.length = length

    @property
    def default_params(self) -> ChainParams:
        return ChainParams(forward=jnp.zeros(self.length, int), reward=1.0, cost=0.02)

    @property
    def num_actions(self) -> int:
        return 2

    def reset_env(self, key, params):
        state = ChainState(position=jnp.zeros((), int), time=jnp.zeros((), int))
        return jax.nn.one_hot(state.position, self.length + 1), state

    def step_env(self, key, state, action, params):
        state = ChainState(position=state.position + (action == params.forward[state.position]), time=state.time + 1)
        ended = self.is_terminated(state, params)
        reward = params.reward * ended - params.cost
        return jax.nn.one_hot(state.position, self.length + 1), state, reward, ended, {}

    def is_terminated(self, state, params):
        return state.position >= self.length

    def action_space(self, params):
        return spaces.Discrete(2)

    def observation_space(self, params):
        return spaces.Box(0.0, 1.0, (self.length + 1,), dtype=jnp.float32)


@pytree
class Chain(TaskFamily):
    """In each state either action leads on, with the same probability; in `ood` a step costs `ood_cost`."""

    horizon: int = static()
    episodes: int = static()
    env: ChainEnv = static()
    prior: None = static(default=None)
    reward: float | jax.Array
    cost: float | jax.Array
    ood_cost: float | jax.Array
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> ChainParams:
        return ChainParams(
            forward=jax.random.randint(key, (self.env.length,), 0, 2),
            reward=self.reward,
            cost=self.ood_cost if split == "ood" else self.cost,
            max_steps_in_episode=self.horizon,
        )

    def fixed(self, split: str) -> None:
        return None

    def oracle(self, task: Any, state: Any) -> jax.Array:
        """Goes on."""
        return task.forward[state.position]

    def expected(self, task: Any, state: Any, action: jax.Array) -> None:
        return None

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        """How far each episode came, by time."""
        for observation, valid in zip(batch.observation, batch.valid, strict=True):
            position = np.argmax(observation[valid], axis=-1)
            axes.plot(np.arange(len(position)), position, color="C0", linewidth=0.8)
        axes.set(xlabel="step", ylabel="state", ylim=(-0.5, self.env.length + 0.5), xlim=(0, self.horizon))


class ChainSettings(FamilySettings):
    length: int = setting("steps d from the start to the reward", unit="steps", ge=1)
    reward: float = setting("of the last step")
    cost: float = setting("of any step", ge=0)
    ood_cost: float = setting("what `cost` is in the split `ood`", ge=0)
    horizon: int = setting("steps after which an episode is truncated", unit="steps", ge=1)
    episodes: int = setting("length of a trial, for learners that live through it one by one", unit="episodes", ge=1)

    def build(self) -> Chain:
        return Chain(
            horizon=self.horizon,
            episodes=self.episodes,
            env=ChainEnv(self.length),
            reward=self.reward,
            cost=self.cost,
            ood_cost=self.ood_cost,
        )
