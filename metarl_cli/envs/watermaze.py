"""A water maze in two dimensions: a circular pool, a hidden platform (Morris 1981; modelled by Foster, Morris, Dayan 2000).

The swimmer starts at the wall, north, east, south or west, knows its position, and is paid 1 on reaching the platform, which
ends the episode. The platform stays where it is for the whole trial: one-trial place learning, the test that Foster et al.
call delayed matching to place. Algorithm Distillation (Laskin et al. 2023) has a three-dimensional one of 50 steps in DMLab.
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
from metarl_cli.core.types import Batch, Key, pytree, static

STARTS = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])  # north, east, south, west
RADIUS = 1.0  # of the pool: the unit of all lengths


@pytree
class WatermazeParams(EnvParams):
    """One task: where the middle of the platform is."""

    platform: jax.Array  # [2]
    max_steps_in_episode: Any = 50


@pytree
class WatermazeState(EnvState):
    position: jax.Array  # [2]
    time: Any  # [] int


def at_most(vector: Any, length: float) -> jax.Array:
    """The vector `[2]`, shortened to `length` where it is longer."""
    norm = jnp.linalg.norm(vector)
    return vector * jnp.minimum(1, length / jnp.maximum(norm, 1e-6))


class WatermazeEnv(Environment[WatermazeState, WatermazeParams]):
    """Each step swims up to `max_step` in any direction; the wall stops it."""

    def __init__(self, platform_radius: float, max_step: float):
        self.platform_radius, self.max_step = platform_radius, max_step

    @property
    def default_params(self) -> WatermazeParams:
        return WatermazeParams(platform=jnp.full(2, 0.5))

    def reset_env(self, key, params):
        position = jax.random.choice(key, jnp.asarray(STARTS, float)) * RADIUS
        return position, WatermazeState(position=position, time=jnp.zeros((), int))

    def step_env(self, key, state, action, params):
        position = at_most(state.position + at_most(action, self.max_step), RADIUS)
        state = WatermazeState(position=position, time=state.time + 1)
        there = self.is_terminated(state, params)
        return position, state, there.astype(float), there, {}

    def is_terminated(self, state, params):
        return jnp.linalg.norm(state.position - params.platform) <= self.platform_radius

    def action_space(self, params):
        return spaces.Box(-self.max_step, self.max_step, (2,), dtype=jnp.float32)

    def observation_space(self, params):
        return spaces.Box(-RADIUS - 1e-3, RADIUS + 1e-3, (2,), dtype=jnp.float32)  # a norm of 1 is so only up to rounding


@pytree
class Watermaze(TaskFamily):
    """Platforms uniform in the disc of radius `reach`; in `ood` in the ring between it and the wall."""

    horizon: int = static()
    episodes: int = static()
    env: WatermazeEnv = static()
    reach: float | jax.Array
    prior: None = static(default=None)
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> WatermazeParams:
        key_radius, key_angle = jax.random.split(key)
        wall = RADIUS - self.env.platform_radius
        inner, outer = (self.reach, wall) if split == "ood" else (0.0, self.reach)
        radius = jnp.sqrt(jax.random.uniform(key_radius, minval=inner**2, maxval=outer**2))  # uniform by area
        angle = jax.random.uniform(key_angle, maxval=2 * jnp.pi)
        platform = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        return WatermazeParams(platform=platform, max_steps_in_episode=self.horizon)

    def fixed(self, split: str) -> None:
        return None

    def oracle(self, task: Any, state: Any) -> jax.Array:
        """Straight to the platform."""
        return at_most(task.platform - state.position, self.env.max_step)

    def expected(self, task: Any, state: Any, action: jax.Array) -> None:
        return None

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        from matplotlib.patches import Circle

        axes.add_patch(Circle((0, 0), RADIUS, facecolor="#EAF3FA", edgecolor="0.6", linewidth=0.8))
        axes.add_patch(Circle(task.platform, self.env.platform_radius, color="C1", linewidth=0, label="platform"))
        swims = np.clip(batch.action, -1, 1) * self.env.max_step
        swims *= np.minimum(1, self.env.max_step / np.maximum(np.linalg.norm(swims, axis=-1, keepdims=True), 1e-6))
        ends = batch.observation + swims
        ends /= np.maximum(1, np.linalg.norm(ends, axis=-1, keepdims=True) / RADIUS)
        for before, after, valid in zip(batch.observation, ends, batch.valid, strict=True):
            path = np.concatenate([before[valid], after[valid][-1:]])
            if len(path):
                axes.plot(path[:, 0], path[:, 1], color="C0", linewidth=0.6, alpha=0.7)
                axes.plot(*path[-1], "o", color="C0", markersize=2, markeredgewidth=0)
                start = {"color": "white", "markeredgecolor": "black", "markersize": 4, "markeredgewidth": 0.8}
                axes.plot(*path[0], "o", linestyle="none", label="start", **start)
        axes.set(aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1], xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))


class WatermazeSettings(FamilySettings):
    platform_radius: float = setting("of the platform", unit="radii of the pool", gt=0, lt=1)
    max_step: float = setting("how far one step swims at most", unit="radii of the pool", gt=0)
    reach: float = setting("how far from the middle platforms are in training", unit="radii of the pool", gt=0, lt=1)
    horizon: int = setting("steps after which an episode is truncated", unit="steps", ge=1)
    episodes: int = setting("length of a trial, for learners that live through it one by one", unit="episodes", ge=1)

    def build(self) -> Watermaze:
        wall = 1 - self.platform_radius
        if self.reach > wall:
            problem = f"a platform of env.platform_radius={self.platform_radius} is in the pool only up to {wall:.3g}"
            raise ConfigError("env.reach", self.reach, problem)
        env = WatermazeEnv(self.platform_radius, self.max_step)
        return Watermaze(horizon=self.horizon, episodes=self.episodes, env=env, reach=self.reach)
