"""2D navigation to an unknown goal, and its kin: sparse rewards, corners, wind, momentum.

Dense: Finn et al. 2017, section 5.3, as the authors' code has it. The paper says "negative squared distance"; the code
(cbfinn/maml_rl@9c8e2eb) and the published returns say the negative distance. The episode ends in the box |dx| < 0.01 and
|dy| < 0.01 around the goal, or after `horizon` steps. The other presets in configs/env/point_nav_*.yaml name theirs.

One step: the action, clipped to `max_step` per axis, is the velocity, or with `momentum` changes it; position += velocity +
the task's wind. Rewards, d being the distance to the goal after the step:
    distance  -d
    near      1 - d where d <= radius, else 0                      (Rakelly et al. 2019)
    inside    1 where d <= radius, else 0                          (Dorfman et al. 2021)
    ramp      max(radius - d, 0)                                   (Rothfuss et al. 2019, MetaPointEnvMomentum)
    progress  d before - d in the quadrant of the goal where |x| + |y| >= radius, else 0    (ditto, MetaPointEnvCorner)
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams, EnvState

from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.settings import FamilySettings, setting
from metarl_cli.core.types import Batch, Key, pytree, static

Goals = Literal["square", "half_circle", "corners", "point"]
Reward = Literal["distance", "near", "inside", "ramp", "progress"]
Published = Literal["maml", "pearl"]


@pytree
class PointNavParams(EnvParams):
    """One task: where the goal is, and what every step adds to the position."""

    goal: jax.Array  # [2]
    wind: jax.Array  # [2]
    max_steps_in_episode: Any = 100


@pytree
class PointNavState(EnvState):
    position: jax.Array  # [2]
    velocity: jax.Array  # [2]; always zero without momentum
    time: Any  # [] int


class PointNavEnv(Environment[PointNavState, PointNavParams]):
    """A point that starts at the origin, or near it, and is moved by at most `max_step` per axis and step."""

    def __init__(self, reward: Reward, radius: float, start: float, max_step: float, goal_box: float, momentum: bool):
        self.reward: Reward = reward
        self.radius, self.start, self.max_step, self.goal_box = radius, start, max_step, goal_box
        self.momentum = momentum

    @property
    def default_params(self) -> PointNavParams:
        return PointNavParams(goal=jnp.full(2, 0.5), wind=jnp.zeros(2))

    def reset_env(self, key, params):
        position = velocity = jnp.zeros(2)
        if self.start > 0:
            key_position, key_velocity = jax.random.split(key)
            position = jax.random.uniform(key_position, (2,), minval=-self.start, maxval=self.start)
            if self.momentum:
                velocity = jax.random.uniform(key_velocity, (2,), minval=-self.max_step, maxval=self.max_step)
        state = PointNavState(position=position, velocity=velocity, time=jnp.zeros((), int))
        return self._observe(state), state

    def step_env(self, key, state, action, params):
        velocity = state.velocity + jnp.clip(action, -self.max_step, self.max_step)
        new = PointNavState(
            position=state.position + velocity + params.wind,
            velocity=velocity if self.momentum else state.velocity,
            time=state.time + 1,
        )
        reward = self._reward(state.position, new.position, params.goal)
        return self._observe(new), new, reward, self.is_terminated(new, params), {}

    def _observe(self, state: PointNavState) -> jax.Array:
        return jnp.concatenate([state.position, state.velocity]) if self.momentum else state.position

    def _reward(self, before: jax.Array, position: jax.Array, goal: jax.Array) -> jax.Array:
        distance = jnp.linalg.norm(position - goal)
        match self.reward:
            case "distance":
                return -distance
            case "near":
                return jnp.where(distance <= self.radius, 1 - distance, 0)
            case "inside":
                return jnp.where(distance <= self.radius, 1.0, 0.0)
            case "ramp":
                return jnp.maximum(self.radius - distance, 0)
            case "progress":
                # Of four corners that of one's own quadrant is the nearest; on the border between two both are.
                counts = jnp.all(position * goal >= 0) & (jnp.sum(jnp.abs(position)) >= self.radius)
                return jnp.where(counts, jnp.linalg.norm(before - goal) - distance, 0)

    def is_terminated(self, state, params):
        return jnp.all(jnp.abs(state.position - params.goal) < self.goal_box)

    def action_space(self, params):
        return spaces.Box(-self.max_step, self.max_step, (2,), dtype=jnp.float32)

    def observation_space(self, params):
        return spaces.Box(-jnp.inf, jnp.inf, (4 if self.momentum else 2,), dtype=jnp.float32)


def frame(key: Key, inner: jax.Array | float, outer: jax.Array | float) -> jax.Array:
    """A point `[2]`, uniform in the square frame between the half-widths `inner` and `outer`."""
    # A uniform direction in the maximum norm, its radius by area.
    key_radius, key_direction = jax.random.split(key)
    direction = jax.random.uniform(key_direction, (2,), minval=-1, maxval=1)
    radius = jnp.sqrt(jax.random.uniform(key_radius, minval=inner**2, maxval=outer**2))
    return radius * direction / jnp.max(jnp.abs(direction))


@pytree
class PointNav(TaskFamily):
    """Goals and winds of `ood` lie where training has none.

    Goals: in a square of half-width `size`, in `ood` in the frame between it and twice its size; on the upper half of a
    circle of radius `size`, in `ood` on the lower half; in one of four corners (+-size, +-size), in `ood` 1.5 times as far;
    always at (size, 0). Wind: up to `wind` per axis, in `ood` between that and 1.5 times as much.
    """

    horizon: int = static()
    episodes: int = static()
    env: PointNavEnv = static()
    goals: Goals = static()
    published: Published | None = static()
    size: float | jax.Array
    wind: float | jax.Array
    prior: None = static(default=None)
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> PointNavParams:
        key_wind = jax.random.fold_in(key, 1)
        if split == "ood":
            wind = frame(key_wind, self.wind, 1.5 * self.wind)
        else:
            wind = jax.random.uniform(key_wind, (2,), minval=-self.wind, maxval=self.wind)
        return PointNavParams(goal=self._goal(key, split == "ood"), wind=wind, max_steps_in_episode=self.horizon)

    def _goal(self, key: Key, ood: bool) -> jax.Array:
        match self.goals:
            case "square" if ood:
                return frame(key, self.size, 2 * self.size)
            case "square":
                return jax.random.uniform(key, (2,), minval=-self.size, maxval=self.size)
            case "half_circle":
                angle = jax.random.uniform(key, maxval=jnp.pi) + (jnp.pi if ood else 0)
                return self.size * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
            case "corners":
                return (1.5 if ood else 1) * self.size * jax.random.rademacher(key, (2,), float)
            case "point":
                return self.size * jnp.array([1.0, 0.0])

    def fixed(self, split: str) -> PointNavParams | None:
        """The goals on which the authors report: 40 of Finn et al., 20 of Rakelly et al."""
        if split != "test" or self.published is None:
            return None
        if self.published == "maml":
            goals = np.random.RandomState(1).uniform(-0.5, 0.5, (40, 2))
        else:
            angles = np.linspace(0, np.pi, 100)
            goals = np.stack([np.cos(angles), np.sin(angles)], axis=1)
            np.random.RandomState(1337).shuffle(goals)
            goals = goals[80:]  # the first 80 are the authors' training tasks
        n = len(goals)
        wind = jnp.zeros((n, 2))
        return PointNavParams(goal=jnp.asarray(goals, float), wind=wind, max_steps_in_episode=jnp.full(n, self.horizon))

    def oracle(self, task: Any, state: Any) -> jax.Array:
        """Straight to the goal, each axis as fast as it can; with momentum no faster than it can brake."""
        velocity = task.goal - state.position - task.wind
        limit = self.env.max_step
        if self.env.momentum:
            # At speed v, v (v + limit) / (2 limit) is still travelled while braking.
            speed = 0.5 * (jnp.sqrt(limit**2 + 8 * limit * jnp.abs(velocity)) - limit)
            velocity = jnp.sign(velocity) * jnp.minimum(speed, jnp.abs(velocity)) - state.velocity
        return jnp.clip(velocity, -limit, limit)

    def expected(self, task: Any, state: Any, action: jax.Array) -> None:
        return None

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        from matplotlib.patches import Arc, Circle, Rectangle

        size, line = float(self.size), {"fill": False, "edgecolor": "0.8", "linewidth": 0.8}
        if self.goals == "square":
            axes.add_patch(Rectangle((-size, -size), 2 * size, 2 * size, **line))
        elif self.goals == "half_circle":
            axes.add_patch(Arc((0, 0), 2 * size, 2 * size, theta1=0, theta2=180, **line))
        elif self.goals == "corners":
            x, y = np.meshgrid([-size, size], [-size, size])
            axes.plot(x.ravel(), y.ravel(), "s", color="0.8", markersize=4)
        if self.env.reward in ("near", "inside"):
            axes.add_patch(Circle(task.goal, self.env.radius, color="C1", alpha=0.15, linewidth=0))
        # An observation is what the action was chosen on: the last position of an episode is one step further.
        ends = batch.observation[..., :2] + np.clip(batch.action, -1, 1) * self.env.max_step + task.wind
        if self.env.momentum:
            ends = ends + batch.observation[..., 2:]
        episodes = zip(batch.observation[..., :2], ends, batch.valid, strict=True)
        for before, after, valid in itertools.islice(episodes, 10):  # more of them hide each other
            path = np.concatenate([before[valid], after[valid][-1:]])
            if len(path):
                axes.plot(path[:, 0], path[:, 1], color="C0", linewidth=0.5, alpha=0.5)
                axes.plot(*path[-1], "o", color="C0", markersize=2, markeredgewidth=0)
        start = {"color": "white", "markeredgecolor": "black", "markersize": 4, "markeredgewidth": 0.8}
        axes.plot(0, 0, "o", linestyle="none", label="start", **start)
        goal = {"color": "C1", "markeredgecolor": "white", "markersize": 9, "markeredgewidth": 0.5}
        axes.plot(*task.goal, "*", linestyle="none", label="goal", **goal)
        if np.any(task.wind):
            style = {"color": "C2", "angles": "xy", "scale_units": "xy", "width": 0.01}
            axes.quiver(0, 0, *task.wind, scale=0.25, label="wind of 4 steps", **style)
        axes.set(aspect="equal", xticks=[-size, 0, size], yticks=[-size, 0, size])


class PointNavSettings(FamilySettings):
    horizon: int = setting("steps after which an episode is truncated", unit="steps", ge=1)
    episodes: int = setting("length of a trial, for learners that live through it one by one", unit="episodes", ge=1)
    goals: Goals = setting("where goals are: in a square, on a half circle, in four corners, always at (size, 0)")
    size: float = setting("half-width of square and corners, radius of the half circle, distance of the point", gt=0)
    reward: Reward = setting("which function of the distance to the goal; see the head of envs/point_nav.py")
    radius: float = setting("of the reward: where it begins; distance has none, and 0 stands for that", ge=0)
    start: float = setting("half-width of the square around the origin that starts are drawn from; 0: the origin", ge=0)
    max_step: float = setting("largest action per axis", gt=0)
    goal_box: float = setting("half-width of the box around the goal that ends the episode; 0: nothing ends it", ge=0)
    wind: float = setting("largest drift per axis and step, drawn for each task", ge=0)
    momentum: bool = setting("whether actions change the velocity, which is then observed, and drawn where the start is")
    published: Published | None = setting("whose published goals are the test tasks; null: new ones are drawn")

    def build(self) -> PointNav:
        if (self.radius > 0) == (self.reward == "distance"):
            needs = "0" if self.radius else "one above 0"
            raise ConfigError("env.radius", self.radius, f"env.reward={self.reward} needs {needs}")
        theirs = {"maml": ("square", 0.5), "pearl": ("half_circle", 1.0), None: (self.goals, self.size)}[self.published]
        if theirs != (self.goals, self.size) or (self.published and self.wind):
            hint = f"They are for env.goals={theirs[0]} env.size={theirs[1]} env.wind=0; env.published=null draws new ones."
            raise ConfigError("env.published", self.published, "these goals are not of this family", hint=hint)
        env = PointNavEnv(self.reward, self.radius, self.start, self.max_step, self.goal_box, self.momentum)
        return PointNav(
            horizon=self.horizon,
            episodes=self.episodes,
            env=env,
            goals=self.goals,
            published=self.published,
            size=self.size,
            wind=self.wind,
        )
