"""The T-maze against plain numpy, as Ni et al. have it, and known values."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from navigation import follow, oracle_episodes
from trajectories import close, family_of, live, one_task, sample


class TMazeReference:
    """A map of free cells, as in `TMazeBase`; `goal_y` is what the task makes of the cue."""

    def __init__(self, task, length):
        self.side, self.length = task.side, length
        self.free = {(x, 0) for x in range(length + 1)} | {(length, 1), (length, -1)}

    def reset(self, state):
        self.x, self.y, self.time = 0, 0, 0
        cue = {0: -1, 1: 1}[int(state.cue)]
        self.goal = self.side[0] if cue == -1 else self.side[1]
        return [0, cue]

    def step(self, action):
        self.time += 1
        dx, dy = [(1, 0), (0, 1), (-1, 0), (0, -1)][action]
        if (self.x + dx, self.y + dy) in self.free:
            self.x, self.y = self.x + dx, self.y + dy
        if self.time == self.length + 1:
            reward = float(self.y == self.goal)
        else:
            reward = -1 / self.length if self.x < self.time else 0
        return [1, self.y] if self.x == self.length else [0, 0], reward, False


@pytest.mark.parametrize("length", [1, 4, 10])
@pytest.mark.parametrize("share", [0.95, 0.3])
def test_against_plain_numpy(length, share):
    family = family_of("t_maze", f"env.length={length}")
    assert family.horizon == length + 1
    tasks = sample(family, 40)
    rewards = follow(family, lambda task: TMazeReference(task, length), tasks, share=share, atol=1e-6)
    assert np.any(rewards == 1) or share < 0.9
    assert np.any(rewards == -np.float32(1 / length))


def test_what_is_to_be_remembered_and_to_be_found_out():
    family = family_of("t_maze")
    tasks = sample(family, 100)
    returns, _, _ = oracle_episodes(family, tasks)
    np.testing.assert_array_equal(returns, 1)

    def believes(task, cue, observation, previous, key):
        """Takes the cue at its word; its memory is the cue."""
        cue = jnp.where(previous.done == 1, observation[1], cue)
        turn = jnp.where(cue > 0, 1, 3)
        return cue, jnp.where(observation[0] == 1, turn, 0), None

    batch = live(family, tasks, believes, jnp.zeros(()))
    earned = batch.reward.sum(1) / family.episodes
    np.testing.assert_array_equal(earned, tasks.side[:, 1] == 1)


def test_splits():
    n = 2000
    family = family_of("t_maze", "env.reversed=0.3")
    for split in ("train", "test"):
        side = sample(family, n, split).side
        np.testing.assert_array_equal(side[:, 0], -side[:, 1])
        assert close(side[:, 1] == -1, 0.3)
    side = sample(family, n, "ood").side
    np.testing.assert_array_equal(side[:, 0], side[:, 1])
    assert close(side[:, 0], 0)
    np.testing.assert_array_equal(sample(family_of("t_maze", "env.reversed=0.0"), 50).side, [[-1, 1]] * 50)


def test_each_episode_draws_its_cue():
    family = family_of("t_maze", "env.episodes=300")
    _, _, batch = oracle_episodes(family, one_task(family, 1))
    assert close(batch.observation[0, :: family.horizon, 1], 0)
