"""The two-step task of Daw et al. (2011), as Wang et al. use it (2016, section 3.2.1; 2018, simulation 4).

From S1, action i leads to the i-th of the two second-stage states with the common probability, else to the other. One of
them pays 1 with a high probability, the other with a low one, whatever the action there, and the next round starts.
Transitions are the same in every task; which second-stage state is the better one is the task.

Where it may change from one round to the next, the task holds it for every round: a learner cannot hold a change up. Since a
reset would set the clock back, all rounds of a trial are one episode then. Otherwise a round is an episode of two steps.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams, EnvState

from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.settings import FamilySettings, setting
from metarl_cli.core.types import Batch, Key, TwoStep, pytree, static


@pytree
class TwoStepParams(EnvParams):
    """One task: which second-stage state (0: S2, 1: S3) is the better one, and the constants of the family."""

    best: jax.Array  # [rounds] int
    common: Any  # [], probability of the common transition
    reward: Any  # [], probability of a reward in the better state; in the other one it is 1 minus that
    max_steps_in_episode: Any = 2


@pytree
class TwoStepState(EnvState):
    state: jax.Array  # [] int, 0: S1, 1: S2, 2: S3
    time: Any  # [] int


class TwoStepEnv(Environment[TwoStepState, TwoStepParams]):
    """Three states, observed as one-hot vectors, and two actions. An episode ends by its time limit alone."""

    @property
    def default_params(self) -> TwoStepParams:
        return TwoStepParams(best=jnp.zeros(1, int), common=0.75, reward=0.9)

    @property
    def num_actions(self) -> int:
        return 2

    def reset_env(self, key, params):
        state = TwoStepState(state=jnp.zeros((), int), time=jnp.zeros((), int))
        return jax.nn.one_hot(state.state, 3), state

    def step_env(self, key, state, action, params):
        second = state.state > 0
        better = state.state - 1 == params.best[state.time // 2]
        pays = jnp.where(better, params.reward, 1 - params.reward)
        happens = jax.random.bernoulli(key, jnp.where(second, pays, params.common))
        reward = (second & happens).astype(float)
        after = jnp.where(second, 0, 1 + jnp.where(happens, action, 1 - action)).astype(state.state.dtype)
        state = TwoStepState(state=after, time=state.time + 1)
        return jax.nn.one_hot(after, 3), state, reward, jnp.zeros((), bool), {}

    def is_terminated(self, state, params):
        return jnp.zeros((), bool)

    def action_space(self, params):
        return spaces.Discrete(2)

    def observation_space(self, params):
        return spaces.Box(0.0, 1.0, (3,), dtype=jnp.float32)


@pytree
class TwoStepTasks(TaskFamily):
    """Either state is the better one; in `ood` it is so by less, with `ood_reward` instead of `reward`."""

    episodes: int = static()
    env: TwoStepEnv = static()
    prior: TwoStep = static()
    horizon: int = static()
    ood_reward: Any
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> TwoStepParams:
        key_first, key_switch = jax.random.split(key)
        first = jax.random.randint(key_first, (1,), 0, 2)
        switches = jax.random.bernoulli(key_switch, self.prior.switch, (self.prior.rounds - 1,))
        return TwoStepParams(
            best=jnp.cumsum(jnp.concatenate([first, switches.astype(first.dtype)])) % 2,
            common=self.prior.common,
            reward=self.ood_reward if split == "ood" else self.prior.reward,
            max_steps_in_episode=self.horizon,
        )

    def fixed(self, split: str) -> None:
        return None

    def oracle(self, task: Any, state: Any) -> jax.Array:
        """The action that commonly leads to the better state; in the second stage any."""
        best = task.best[state.time // 2]
        return jnp.where(task.common >= 0.5, best, 1 - best)

    def expected(self, task: Any, state: Any, action: jax.Array) -> None:
        return None

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        """Which first action is the better one, and which was taken, by round; by episode where an episode is one round."""
        best, taken = np.asarray(task.best) + 1, 1 + batch.action[:, ::2]
        if self.prior.rounds == 1:
            best, taken = np.repeat(best, len(taken)), taken[:, 0]
        else:
            taken = taken.mean(axis=0)
        rounds = np.arange(1, len(best) + 1)
        axes.step(rounds, best, color="0.6", where="mid", label="better first action")
        axes.plot(rounds, taken, ".", color="C0", markersize=3, label="taken")
        name = "episode" if self.prior.rounds == 1 else "round"
        axes.set(xlabel=name, ylabel="first action", ylim=(0.9, 2.1), yticks=[1, 2])


class TwoStepSettings(FamilySettings):
    episodes: int = setting("length of a trial", unit="episodes", ge=1)
    rounds: int = setting("rounds of an episode, two steps each; 1 unless the better state may change", ge=1)
    common: float = setting("probability of the common transition", ge=0, le=1)
    reward: float = setting("probability of a reward in the better state; in the other one it is 1 minus that", ge=0, le=1)
    switch: float = setting("probability that the better state changes before a round of an episode", ge=0, le=1)
    ood_reward: float = setting("what `reward` is in the split `ood`", ge=0, le=1)

    def build(self) -> TwoStepTasks:
        if self.switch > 0 and self.rounds == 1:
            hint = "Set env.rounds to the rounds of a trial, and env.episodes=1."
            raise ConfigError("env.switch", self.switch, "there is nothing to switch in an episode of one round", hint=hint)
        return TwoStepTasks(
            episodes=self.episodes,
            env=TwoStepEnv(),
            prior=TwoStep(self.rounds, self.common, self.reward, self.switch),
            horizon=2 * self.rounds,
            ood_reward=self.ood_reward,
        )
