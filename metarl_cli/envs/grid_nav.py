"""An unknown goal on an empty grid: GridNavi (Zintgraf et al. 2020) and Dark Room (Laskin et al. 2023).

GridNavi is lmzintgraf/varibad, environments/navigation/gridworld.py: 5 actions (stay, up, right, down, left), the reward of
the cell that a step ends on, nothing ends the episode but its horizon. Dark Room differs in the numbers only.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams, EnvState

from metarl_cli.core.errors import ConfigError
from metarl_cli.core.grids import (
    MOVES,
    Observe,
    draw_grid,
    draw_mark,
    draw_paths,
    move,
    observation_space,
    observe,
    observed,
    toward,
)
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.settings import FamilySettings, setting
from metarl_cli.core.types import Batch, GoalGrid, Key, pytree, static


@pytree
class GridNavParams(EnvParams):
    """One task: where the goal is, and what each action does."""

    goal: jax.Array  # [2]
    moves: jax.Array  # [5, 2]
    reward: jax.Array  # [2], off and on the goal
    max_steps_in_episode: Any = 15


@pytree
class GridNavState(EnvState):
    cell: jax.Array  # [2]
    reached: jax.Array  # [] bool, whether the goal has been, in this episode
    time: Any  # [] int


class GridNavEnv(Environment[GridNavState, GridNavParams]):
    """The cell is all that is observed."""

    def __init__(self, size: int, start: tuple[int, int], once: bool, how: Observe):
        self.size, self.start, self.once = size, start, once
        self.how: Observe = how

    @property
    def default_params(self) -> GridNavParams:
        goal = jnp.full(2, self.size - 1)
        return GridNavParams(goal=goal, moves=jnp.asarray(MOVES), reward=jnp.array([0.0, 1.0]))

    @property
    def num_actions(self) -> int:
        return len(MOVES)

    def reset_env(self, key, params):
        cell = jnp.array(self.start)
        state = GridNavState(cell=cell, reached=jnp.zeros((), bool), time=jnp.zeros((), int))
        return observe(cell, self.size, self.how), state

    def step_env(self, key, state, action, params):
        cell = move(state.cell, params.moves[action], self.size)
        there = jnp.all(cell == params.goal)
        pays = there & ~state.reached if self.once else there
        state = GridNavState(cell=cell, reached=state.reached | there, time=state.time + 1)
        return observe(cell, self.size, self.how), state, params.reward[pays.astype(int)], jnp.zeros((), bool), {}

    def is_terminated(self, state, params):
        return jnp.zeros((), bool)

    def action_space(self, params):
        return spaces.Discrete(len(MOVES))

    def observation_space(self, params):
        return observation_space(self.size, self.how)


@pytree
class GridNav(TaskFamily):
    """Goals uniform on the allowed cells; in `ood` what the five actions do is shuffled as well."""

    horizon: int = static()
    episodes: int = static()
    env: GridNavEnv = static()
    prior: GoalGrid = static()
    off_goal: float | jax.Array
    on_goal: float | jax.Array
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> GridNavParams:
        key_goal, key_moves = jax.random.split(key)
        moves = jnp.asarray(MOVES)
        return GridNavParams(
            goal=jax.random.choice(key_goal, jnp.array(self.prior.goals)),
            moves=jax.random.permutation(key_moves, moves) if split == "ood" else moves,
            reward=jnp.stack([jnp.asarray(self.off_goal, float), jnp.asarray(self.on_goal, float)]),
            max_steps_in_episode=self.horizon,
        )

    def fixed(self, split: str) -> None:
        return None

    def oracle(self, task: Any, state: Any) -> jax.Array:
        """A shortest path, and then stays."""
        return toward(state.cell, task.goal, task.moves, self.env.size)

    def expected(self, task: Any, state: Any, action: jax.Array) -> None:
        return None

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        size = self.env.size
        draw_grid(axes, size)
        cells = observed(batch.observation, size, self.env.how)
        draw_paths(axes, cells, np.clip(cells + task.moves[batch.action], 0, size - 1), batch)
        draw_mark(axes, task.goal, "*", "goal")


class GridNavSettings(FamilySettings):
    size: int = setting("cells along each side", unit="cells", ge=2)
    start: Literal["corner", "center"] = setting("where an episode begins: bottom left, or in the middle")
    clearance: int = setting("goals are at least so many columns or rows away from the start", unit="cells", ge=0)
    on_goal: float = setting("reward of a step that ends on the goal")
    off_goal: float = setting("reward of any other step")
    once: bool = setting("whether the goal pays only the first time in an episode")
    observation: Observe = setting("column and row as two numbers, or the cell one-hot")
    horizon: int = setting("steps after which an episode is truncated", unit="steps", ge=1)
    episodes: int = setting("length of a trial, for learners that live through it one by one", unit="episodes", ge=1)

    def build(self) -> GridNav:
        start = (0, 0) if self.start == "corner" else (self.size // 2, self.size // 2)
        cells = [(x, y) for x in range(self.size) for y in range(self.size)]
        goals = tuple(c for c in cells if max(abs(c[0] - start[0]), abs(c[1] - start[1])) >= self.clearance)
        if not goals:
            raise ConfigError("env.clearance", self.clearance, f"no cell of a grid of env.size={self.size} is so far away")
        return GridNav(
            horizon=self.horizon,
            episodes=self.episodes,
            env=GridNavEnv(self.size, start, self.once, self.observation),
            prior=GoalGrid(self.size, start, goals, self.on_goal, self.off_goal, self.once),
            off_goal=self.off_goal,
            on_goal=self.on_goal,
        )
