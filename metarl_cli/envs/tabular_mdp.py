"""Random tabular MDPs (Duan et al. 2016, section 3.2).

Everything is drawn anew for each MDP: the mean rewards as well, which a reading of the paper's text leaves open and the
authors' code (`RandomTabularMDPEnv`, openai/gym#408) does not. Every episode starts in state 0 and takes `horizon` steps.
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
from metarl_cli.core.types import Batch, Key, TabularMDP, pytree, static


@pytree
class TabularMDPParams(EnvParams):
    """One task: an MDP."""

    transition: jax.Array  # [S, A, S]
    reward: jax.Array  # [S, A], means
    noise: Any  # [], standard deviation of a reward around its mean
    max_steps_in_episode: Any = 10


@pytree
class TabularMDPState(EnvState):
    state: jax.Array  # [] int
    time: Any  # [] int


class TabularMDPEnv(Environment[TabularMDPState, TabularMDPParams]):
    """S states, observed as one-hot vectors, and A actions. An episode ends by its time limit alone."""

    def __init__(self, states: int, actions: int):
        self.states = states
        self.actions = actions

    @property
    def default_params(self) -> TabularMDPParams:
        transition = jnp.full((self.states, self.actions, self.states), 1 / self.states)
        return TabularMDPParams(transition=transition, reward=jnp.ones((self.states, self.actions)), noise=1.0)

    @property
    def num_actions(self) -> int:
        return self.actions

    def reset_env(self, key, params):
        state = TabularMDPState(state=jnp.zeros((), int), time=jnp.zeros((), int))
        return jax.nn.one_hot(state.state, self.states), state

    def step_env(self, key, state, action, params):
        key_next, key_reward = jax.random.split(key)
        # By the inverse of the distribution function: one uniform number instead of one per state.
        below = jnp.cumsum(params.transition[state.state, action])
        after = jnp.sum(below <= jax.random.uniform(key_next) * below[-1])
        reward = params.reward[state.state, action] + params.noise * jax.random.normal(key_reward)
        state = TabularMDPState(state=after.astype(state.state.dtype), time=state.time + 1)
        return jax.nn.one_hot(after, self.states), state, reward, jnp.zeros((), bool), {}

    def is_terminated(self, state, params):
        return jnp.zeros((), bool)

    def action_space(self, params):
        return spaces.Discrete(self.actions)

    def observation_space(self, params):
        return spaces.Box(0.0, 1.0, (self.states,), dtype=jnp.float32)


def distributions(key: Key, concentration: float, shape: tuple[int, ...]) -> jax.Array:
    """Symmetric Dirichlet distributions along the last axis."""
    if concentration == 1:  # the uniform distribution on the simplex, without the costly rejections of gamma variates
        weights = jax.random.exponential(key, shape)
        return weights / jnp.sum(weights, axis=-1, keepdims=True)
    return jax.random.dirichlet(key, jnp.full(shape[-1], concentration, float), shape[:-1])


@pytree
class RandomMDPs(TaskFamily):
    """MDPs of the prior; in `ood` transitions are Dirichlet(ood_dirichlet).

    With `reward_mean_std` the mean of the rewards of an MDP is drawn first, of which the prior knows nothing.
    """

    episodes: int = static()
    env: TabularMDPEnv = static()
    prior: TabularMDP = static()
    horizon: int = static()
    reward_mean_std: float = static()
    ood_dirichlet: float = static()
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> TabularMDPParams:
        key_transition, key_reward = jax.random.split(key)
        prior = self.prior
        dirichlet = self.ood_dirichlet if split == "ood" else prior.dirichlet
        reward = jax.random.normal(key_reward, (prior.states, prior.actions))
        mean = prior.reward_mean
        if self.reward_mean_std > 0:
            mean += self.reward_mean_std * jax.random.normal(jax.random.fold_in(key_reward, 1))
        return TabularMDPParams(
            transition=distributions(key_transition, dirichlet, (prior.states, prior.actions, prior.states)),
            reward=mean + prior.reward_std * reward,
            noise=prior.reward_noise,
            max_steps_in_episode=self.horizon,
        )

    def fixed(self, split: str) -> None:
        return None

    def values(self, task: Any) -> jax.Array:
        """The largest sum of rewards that is left, by time, state and action: `[T, S, A]` (value iteration)."""

        def back(value, _):
            q = task.reward + jnp.einsum("san,n->sa", task.transition, value)
            return jnp.max(q, axis=1), q

        return jax.lax.scan(back, jnp.zeros(self.prior.states), length=self.horizon, reverse=True)[1]

    def oracle(self, task: Any, state: Any) -> jax.Array:
        """Optimal for the steps that are left."""
        return jnp.argmax(self.values(task)[state.time, state.state])

    def expected(self, task: Any, state: Any, action: jax.Array) -> None:
        return None

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        """Mean rewards as a map, and how often each action was taken in each state."""
        counts = np.zeros((self.prior.actions, self.prior.states))
        visited = np.argmax(batch.observation, axis=-1)
        np.add.at(counts, (batch.action[batch.valid], visited[batch.valid]), 1)
        state, action = np.meshgrid(np.arange(self.prior.states), np.arange(self.prior.actions))
        axes.imshow(task.reward.T, cmap="Greys", origin="lower", aspect="auto")
        area = 60 * counts.ravel() / max(1, counts.max())
        label = "taken (area: how often; the darker, the higher the mean reward)"
        axes.scatter(state.ravel(), action.ravel(), s=area, color="C0", label=label)
        axes.set(xlabel="state", ylabel="action", xticks=[0, self.prior.states - 1], yticks=[0, self.prior.actions - 1])


class TabularMDPSettings(FamilySettings):
    states: int = setting("states", ge=2)
    actions: int = setting("actions", ge=2)
    horizon: int = setting("steps of an episode", unit="steps", ge=1)
    episodes: int = setting("length of a trial", unit="episodes", ge=1)
    reward_mean: float = setting("mean of the mean rewards")
    reward_mean_std: float = setting("standard deviation of `reward_mean` over MDPs, unknown to Bayesian learners", ge=0)
    reward_std: float = setting("standard deviation of the mean rewards", gt=0)
    reward_noise: float = setting("standard deviation of a reward around its mean", ge=0)
    dirichlet: float = setting("concentration of the transitions; small: nearly deterministic", gt=0)
    ood_dirichlet: float = setting("what `dirichlet` is in the split `ood`", gt=0)

    def build(self) -> RandomMDPs:
        prior = TabularMDP(
            states=self.states,
            actions=self.actions,
            horizon=self.horizon,
            reward_mean=self.reward_mean,
            reward_std=self.reward_std,
            reward_noise=self.reward_noise,
            dirichlet=self.dirichlet,
        )
        return RandomMDPs(
            episodes=self.episodes,
            env=TabularMDPEnv(self.states, self.actions),
            prior=prior,
            horizon=self.horizon,
            reward_mean_std=self.reward_mean_std,
            ood_dirichlet=self.ood_dirichlet,
        )
