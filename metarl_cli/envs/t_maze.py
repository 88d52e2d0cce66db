"""A T-maze whose cue has to be remembered, and whose meaning has to be found out.

The maze is the passive T-maze of Ni et al. 2023 (twni2016/Memory-RL, envs/tmaze.py `TMazeClassicPassive`), after Bakker
2001: a corridor of `length` steps, a junction at its end, an arm to each side. A cue is seen at the very first step only;
within the corridor nothing is, so that positions look alike; at the end of the episode, after length + 1 steps, being in the
right arm pays 1. Every step that lags behind going straight ahead costs 1 / length: what is hard is memory, not exploration.

There the cue always names the side of the reward: one MDP, no family. Here the task is what the cue means: it names the side
of the reward, or the other one, and each episode draws its cue anew. So a learner needs a memory within the episode (for the
cue) and one across episodes (for its meaning), and the first observation does not tell the task. With `reversed` = 0 it is
Ni et al.'s. In `ood` the cue means nothing: the reward is always on the same side, and which that is, is the task.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams, EnvState

from metarl_cli.core.grids import DRAWN
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.settings import FamilySettings, setting
from metarl_cli.core.types import Batch, Key, pytree, static

MOVES = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # ahead, up, back, down


@pytree
class TMazeParams(EnvParams):
    """One task: where the reward is after the cue "down" and after the cue "up"."""

    side: jax.Array  # [2], each -1 (down) or 1 (up)
    max_steps_in_episode: Any = 11


@pytree
class TMazeState(EnvState):
    cell: jax.Array  # [2]: steps along the corridor, and 0 or the arm, -1 or 1
    cue: jax.Array  # [] int, 0 (down) or 1 (up)
    time: Any  # [] int


class TMazeEnv(Environment[TMazeState, TMazeParams]):
    """Observed are `[0, cue]` (-1 or 1) at first, `[0, 0]` in the corridor, `[1, arm]` at its end."""

    def __init__(self, length: int):
        self.length = length

    @property
    def default_params(self) -> TMazeParams:
        return TMazeParams(side=jnp.array([-1, 1]), max_steps_in_episode=self.length + 1)

    @property
    def num_actions(self) -> int:
        return len(MOVES)

    def reset_env(self, key, params):
        cue = jax.random.bernoulli(key).astype(int)
        state = TMazeState(cell=jnp.zeros(2, int), cue=cue, time=jnp.zeros((), int))
        return jnp.stack([0, 2 * cue - 1]).astype(float), state

    def step_env(self, key, state, action, params):
        ahead, arm = state.cell + jnp.asarray(MOVES)[action]
        there = (ahead >= 0) & (ahead <= self.length) & (jnp.abs(arm) <= jnp.where(ahead == self.length, 1, 0))
        cell = jnp.where(there, jnp.stack([ahead, arm]), state.cell)
        time = state.time + 1
        late = jnp.where(cell[0] < time, -1 / self.length, 0)
        right = (cell[1] == params.side[state.cue]).astype(float)
        reward = jnp.where(time >= params.max_steps_in_episode, right, late)
        junction = cell[0] == self.length
        observation = jnp.where(junction, jnp.stack([1, cell[1]]), 0).astype(float)
        return observation, TMazeState(cell=cell, cue=state.cue, time=time), reward, jnp.zeros((), bool), {}

    def is_terminated(self, state, params):
        return jnp.zeros((), bool)

    def action_space(self, params):
        return spaces.Discrete(len(MOVES))

    def observation_space(self, params):
        return spaces.Box(-1, 1, (2,), dtype=jnp.float32)


@pytree
class TMaze(TaskFamily):
    """The cue names the side of the reward, or the other with probability `reversed`; in `ood` it means nothing."""

    horizon: int = static()
    episodes: int = static()
    env: TMazeEnv = static()
    reversed: float | jax.Array
    prior: None = static(default=None)
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> TMazeParams:
        cues = jnp.array([-1, 1])
        if split == "ood":
            side = jnp.full(2, jax.random.choice(key, cues))
        else:
            side = jnp.where(jax.random.bernoulli(key, self.reversed), -cues, cues)
        return TMazeParams(side=side, max_steps_in_episode=self.horizon)

    def fixed(self, split: str) -> None:
        return None

    def oracle(self, task: Any, state: Any) -> jax.Array:
        """Ahead, then into the right arm, against whose end it stays."""
        turn = jnp.where(task.side[state.cue] == 1, 1, 3)
        return jnp.where(state.cell[0] < self.env.length, 0, turn)

    def expected(self, task: Any, state: Any, action: jax.Array) -> None:
        return None

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        length = self.env.length
        axes.plot([0, length], [0, 0], color="0.88", linewidth=14, solid_capstyle="projecting")
        axes.plot([length, length], [-1, 1], color="0.88", linewidth=14, solid_capstyle="projecting")
        beside = np.linspace(-0.12, 0.12, DRAWN)  # the first episodes, each a little beside the others
        for observation, actions, valid, shift in zip(batch.observation, batch.action, batch.valid, beside, strict=False):
            cells = [np.zeros(2, int)]
            for action in actions[valid]:
                ahead, arm = cells[-1] + MOVES[action]
                free = 0 <= ahead <= length and abs(arm) <= (ahead == length)
                cells.append(np.array([ahead, arm]) if free else cells[-1])
            cue = int(observation[0, 1] > 0)
            color = ("C0", "C4")[cue]
            path = np.array(cells) + shift
            axes.plot(path[:, 0], path[:, 1], color=color, linewidth=0.8, label=f"cue {('down', 'up')[cue]}")
            axes.plot(*path[-1], "o", color=color, markersize=3, markeredgewidth=0)
        for cue, color in enumerate(("C0", "C4")):
            star = {"color": color, "markeredgecolor": "white", "markersize": 10, "markeredgewidth": 0.5}
            axes.plot(
                length,
                task.side[cue],
                "*",
                linestyle="none",
                label=f"reward, cue {('down', 'up')[cue]}",
                **star,
            )
        axes.set(xticks=[0, length], yticks=[-1, 0, 1], yticklabels=["down", "", "up"], ylim=(-1.6, 1.6))


class TMazeSettings(FamilySettings):
    length: int = setting("of the corridor; an episode is one step longer", unit="steps", ge=1)
    reversed: float = setting("share of tasks in which the cue names the side without the reward", ge=0, le=1)
    episodes: int = setting("length of a trial, for learners that live through it one by one", unit="episodes", ge=1)

    def build(self) -> TMaze:
        env = TMazeEnv(self.length)
        return TMaze(horizon=self.length + 1, episodes=self.episodes, env=env, reversed=self.reversed)
