"""2D navigation to an unknown goal (Finn et al. 2017, section 5.3), as the authors' code has it.

The paper says "negative squared distance"; the code (cbfinn/maml_rl@9c8e2eb) and the published returns say the negative
distance. The episode ends in the box |dx| < 0.01 and |dy| < 0.01 around the goal, or after `horizon` steps.
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

MAX_STEP = 0.1
GOAL_BOX = 0.01


@pytree
class PointNavParams(EnvParams):
    """One task: where the goal is."""

    goal: jax.Array  # [2]
    max_steps_in_episode: Any = 100


@pytree
class PointNavState(EnvState):
    position: jax.Array  # [2]
    time: Any  # [] int


class PointNavEnv(Environment[PointNavState, PointNavParams]):
    """A point that starts at the origin and moves by at most 0.1 per axis and step."""

    @property
    def default_params(self) -> PointNavParams:
        return PointNavParams(goal=jnp.full(2, 0.5))

    def reset_env(self, key, params):
        state = PointNavState(position=jnp.zeros(2), time=jnp.zeros((), int))
        return state.position, state

    def step_env(self, key, state, action, params):
        position = state.position + jnp.clip(action, -MAX_STEP, MAX_STEP)
        reward = -jnp.linalg.norm(position - params.goal)
        state = PointNavState(position=position, time=state.time + 1)
        return position, state, reward, self.is_terminated(state, params), {}

    def is_terminated(self, state, params):
        return jnp.all(jnp.abs(state.position - params.goal) < GOAL_BOX)

    def action_space(self, params):
        return spaces.Box(-MAX_STEP, MAX_STEP, (2,), dtype=jnp.float32)

    def observation_space(self, params):
        return spaces.Box(-jnp.inf, jnp.inf, (2,), dtype=jnp.float32)


@pytree
class PointNav(TaskFamily):
    """Goals uniform in the square |x|, |y| <= 0.5; in `ood` in the frame between it and |x|, |y| <= 1."""

    horizon: int = static()
    episodes: int = static()
    env: PointNavEnv = static()
    prior: None = static(default=None)
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> PointNavParams:
        goal = jax.random.uniform(key, (2,), minval=-0.5, maxval=0.5)
        if split == "ood":
            # Uniform in the frame: a uniform direction in the maximum norm, its radius by area.
            key_radius, key_direction = jax.random.split(key)
            direction = jax.random.uniform(key_direction, (2,), minval=-1, maxval=1)
            radius = jnp.sqrt(jax.random.uniform(key_radius, minval=0.25, maxval=1.0))
            goal = radius * direction / jnp.max(jnp.abs(direction))
        return PointNavParams(goal=goal, max_steps_in_episode=self.horizon)

    def fixed(self, split: str) -> PointNavParams | None:
        """The 40 goals on which the authors report."""
        if split != "test":
            return None
        goals = np.random.RandomState(1).uniform(-0.5, 0.5, (40, 2))
        return PointNavParams(goal=jnp.asarray(goals, float), max_steps_in_episode=jnp.full(40, self.horizon))

    def oracle(self, task: Any, state: Any) -> jax.Array:
        """Straight to the goal, each axis as fast as it can."""
        return jnp.clip(task.goal - state.position, -MAX_STEP, MAX_STEP)

    def expected(self, task: Any, state: Any, action: jax.Array) -> None:
        return None

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        from matplotlib.patches import Rectangle

        axes.add_patch(Rectangle((-0.5, -0.5), 1, 1, fill=False, edgecolor="0.8", linewidth=0.8))
        # An observation is what the action was chosen on: the last position of an episode is one step further.
        ends = batch.observation + np.clip(batch.action, -1, 1) * MAX_STEP
        for before, after, valid in zip(batch.observation, ends, batch.valid, strict=True):
            path = np.concatenate([before[valid], after[valid][-1:]])
            if len(path):
                axes.plot(path[:, 0], path[:, 1], color="C0", linewidth=0.5, alpha=0.5)
                axes.plot(*path[-1], "o", color="C0", markersize=2, markeredgewidth=0)
        start = {"color": "white", "markeredgecolor": "black", "markersize": 4, "markeredgewidth": 0.8}
        axes.plot(0, 0, "o", linestyle="none", label="start", **start)
        goal = {"color": "C1", "markeredgecolor": "white", "markersize": 9, "markeredgewidth": 0.5}
        axes.plot(*task.goal, "*", linestyle="none", label="goal", **goal)
        axes.set(aspect="equal", xticks=[-0.5, 0, 0.5], yticks=[-0.5, 0, 0.5])


class PointNavSettings(FamilySettings):
    horizon: int = setting("steps after which an episode is truncated", unit="steps", ge=1)
    episodes: int = setting("length of a trial, for learners that live through it one by one", unit="episodes", ge=1)

    def build(self) -> PointNav:
        return PointNav(horizon=self.horizon, episodes=self.episodes, env=PointNavEnv())
