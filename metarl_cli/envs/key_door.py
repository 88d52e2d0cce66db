"""Dark Key-to-Door: an invisible key, then an invisible door (Laskin et al. 2023, Algorithm Distillation, section 4).

9x9 cells, 81^2 = 6561 tasks, "the agent is randomly reset", 50 steps; 1 for finding the key and 1 for then opening the door,
each once in an episode. Only the agent's own position is observed: whether it has the key it knows from the reward.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams, EnvState

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
from metarl_cli.core.types import Batch, Key, pytree, static


@pytree
class KeyDoorParams(EnvParams):
    """One task: where key and door are (it may be the same cell), and what each action does."""

    key: jax.Array  # [2]
    door: jax.Array  # [2]
    moves: jax.Array  # [5, 2]
    max_steps_in_episode: Any = 50


@pytree
class KeyDoorState(EnvState):
    cell: jax.Array  # [2]
    has_key: jax.Array  # [] bool
    opened: jax.Array  # [] bool
    time: Any  # [] int


class KeyDoorEnv(Environment[KeyDoorState, KeyDoorParams]):
    """An episode begins on any cell."""

    def __init__(self, size: int, ends: bool, how: Observe):
        self.size, self.ends = size, ends
        self.how: Observe = how

    @property
    def default_params(self) -> KeyDoorParams:
        return KeyDoorParams(key=jnp.zeros(2, int), door=jnp.full(2, self.size - 1), moves=jnp.asarray(MOVES))

    @property
    def num_actions(self) -> int:
        return len(MOVES)

    def reset_env(self, key, params):
        cell, no = jax.random.randint(key, (2,), 0, self.size), jnp.zeros((), bool)
        return observe(cell, self.size, self.how), KeyDoorState(cell=cell, has_key=no, opened=no, time=jnp.zeros((), int))

    def step_env(self, key, state, action, params):
        cell = move(state.cell, params.moves[action], self.size)
        has_key = state.has_key | jnp.all(cell == params.key)
        opened = state.opened | (has_key & jnp.all(cell == params.door))
        reward = (has_key ^ state.has_key).astype(float) + (opened ^ state.opened).astype(float)
        state = KeyDoorState(cell=cell, has_key=has_key, opened=opened, time=state.time + 1)
        return observe(cell, self.size, self.how), state, reward, self.is_terminated(state, params), {}

    def is_terminated(self, state, params):
        return state.opened if self.ends else jnp.zeros((), bool)

    def action_space(self, params):
        return spaces.Discrete(len(MOVES))

    def observation_space(self, params):
        return observation_space(self.size, self.how)


@pytree
class KeyDoor(TaskFamily):
    """Key and door independent and uniform; in `ood` what the five actions do is shuffled as well."""

    horizon: int = static()
    episodes: int = static()
    env: KeyDoorEnv = static()
    prior: None = static(default=None)
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> KeyDoorParams:
        key_cells, key_moves = jax.random.split(key)
        cells = jax.random.randint(key_cells, (2, 2), 0, self.env.size)
        moves = jnp.asarray(MOVES)
        return KeyDoorParams(
            key=cells[0],
            door=cells[1],
            moves=jax.random.permutation(key_moves, moves) if split == "ood" else moves,
            max_steps_in_episode=self.horizon,
        )

    def fixed(self, split: str) -> None:
        return None

    def oracle(self, task: Any, state: Any) -> jax.Array:
        """A shortest path to the key, then one to the door."""
        return toward(state.cell, jnp.where(state.has_key, task.door, task.key), task.moves, self.env.size)

    def expected(self, task: Any, state: Any, action: jax.Array) -> None:
        return None

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        size = self.env.size
        draw_grid(axes, size)
        cells = observed(batch.observation, size, self.env.how)
        draw_paths(axes, cells, np.clip(cells + task.moves[batch.action], 0, size - 1), batch)
        draw_mark(axes, task.key, "P", "key", color="C2")
        draw_mark(axes, task.door, "s", "door")


class KeyDoorSettings(FamilySettings):
    size: int = setting("cells along each side", unit="cells", ge=2)
    ends: bool = setting("whether opening the door ends the episode")
    observation: Observe = setting("column and row as two numbers, or the cell one-hot")
    horizon: int = setting("steps after which an episode is truncated", unit="steps", ge=1)
    episodes: int = setting("length of a trial, for learners that live through it one by one", unit="episodes", ge=1)

    def build(self) -> KeyDoor:
        env = KeyDoorEnv(self.size, self.ends, self.observation)
        return KeyDoor(horizon=self.horizon, episodes=self.episodes, env=env)
