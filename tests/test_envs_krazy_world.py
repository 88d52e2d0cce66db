"""Krazy World against plain numpy, written after the authors' recursive `update_agent_pos`, and its boards."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from navigation import follow, oracle_episodes
from trajectories import family_of, play, sample

from metarl_cli.core.errors import ConfigError
from metarl_cli.envs.krazy_world import DEATH, ENERGY, GOAL, ICE, KEY, LOCK, NORMAL, TELEPORTER, TILES, WALL

PLAIN = ("env.swap_dynamics=false",)  # the second writing does not know in which order a task has the actions
NO_LOCK = ("env.lock=false", "env.death=8", "env.ice=20", "env.energy=50", "env.energy_tiles=5")


class KrazyReference:
    """`partner` is the other end of the one pair of teleporters."""

    def __init__(self, task, size, energy, replenish):
        self.board, self.size = task.tile.reshape(size, size), size  # [y, x]
        self.start, self.code = divmod(int(task.start), size), task.code
        self.full, self.replenish = energy, replenish
        ends = [tuple(x) for x in np.argwhere(self.board == TELEPORTER)]
        self.partner = {ends[0]: ends[1], ends[1]: ends[0]}

    def reset(self, state):
        self.at, self.tiles = self.start, self.board.copy()
        self.has_key, self.dead, self.energy, self.got = False, False, self.full, 0
        return self.seen()

    def step(self, action):
        before = self.got
        self.move([(1, 0), (0, 1), (-1, 0), (0, -1)][action])
        self.energy -= 1
        return self.seen(), self.got - before, self.dead or self.energy < 1

    def move(self, by, depth=0):
        y, x = self.at[0] + by[0], self.at[1] + by[1]
        if 0 <= y < self.size and 0 <= x < self.size:
            tile = self.tiles[y, x]
            if tile != WALL and (tile != LOCK or self.has_key):
                self.at = (y, x)
        tile = self.tiles[self.at]
        if tile in (GOAL, KEY, ENERGY):
            self.tiles[self.at] = NORMAL
        self.got += tile == GOAL
        self.has_key |= bool(tile == KEY)
        if tile == ENERGY:
            self.energy += self.replenish
        if tile == TELEPORTER:
            self.at = self.partner[self.at]
        self.dead |= bool(tile == DEATH)
        if tile == ICE and depth < 20:
            self.move(by, depth + 1)

    def seen(self):
        view = np.zeros((3, 3, len(TILES)))
        for i in range(3):
            for j in range(3):
                y, x = self.at[0] + i - 1, self.at[1] + j - 1
                if 0 <= y < self.size and 0 <= x < self.size:
                    view[i, j, self.code[self.tiles[y, x]]] = 1
        cell = np.zeros(self.size**2)
        cell[self.at[0] * self.size + self.at[1]] = 1
        return np.concatenate([view.ravel(), cell])


@pytest.mark.parametrize(("changes", "energy"), [((), 12), (NO_LOCK, 50)])
def test_against_plain_numpy(changes, energy):
    family = family_of("krazy_world", "env.horizon=60", *PLAIN, *changes)
    tasks = sample(family, 12)
    rewards = follow(family, lambda task: KrazyReference(task, 10, energy, 8), tasks, share=0.9)
    assert np.any(rewards == 1)


def test_the_four_actions_are_shuffled():
    """Each task has the moves of the same board, in an order of its own."""
    shuffled, plain = (sample(family_of("krazy_world", *changes), 200) for changes in ((), PLAIN))
    np.testing.assert_array_equal(shuffled.tile, plain.tile)
    orders = set()
    for a, b in zip(shuffled.leads, plain.leads, strict=True):
        order = tuple(int(np.flatnonzero([np.array_equal(a[:, i], b[:, j]) for j in range(4)])[0]) for i in range(4))
        assert sorted(order) == [0, 1, 2, 3]
        orders.add(order)
    assert len(orders) == 24


def test_boards():
    for split, death in (("train", 15), ("ood", 30)):
        tasks = sample(family_of("krazy_world"), 300, split)
        counts = {kind: np.sum(tasks.tile == kind, axis=1) for kind in range(len(TILES))}
        for kind, n in ((GOAL, 3), (ICE, 10), (DEATH, death), (TELEPORTER, 2), (ENERGY, 10), (LOCK, 1), (KEY, 1)):
            np.testing.assert_array_equal(counts[kind], n)
        assert np.all(counts[WALL] >= 3)
        assert np.all(np.take_along_axis(tasks.tile, tasks.start[:, None], 1) == NORMAL)
        np.testing.assert_array_equal(np.sort(tasks.code, axis=1), np.broadcast_to(np.arange(9), (300, 9)))
        assert len(np.unique(tasks.code, axis=0)) > 250
        cells = np.stack(np.divmod(np.arange(100), 10), axis=-1)
        for tile, start in zip(tasks.tile, tasks.start, strict=True):
            door = np.abs(cells - cells[tile == LOCK]).sum(1)
            assert np.all(door[(tile == DEATH) | (tile == ICE)] > 2)
            assert np.all(np.abs(cells - cells[start]).sum(1)[tile == GOAL] > 1)
    tasks = sample(family_of("krazy_world", *NO_LOCK), 300)
    assert not np.any(np.isin(tasks.tile, (WALL, LOCK, KEY)))
    # Nothing keeps away from anything there, but for the start: every cell has ice as often as any other.
    assert np.all(np.abs((tasks.tile == ICE).mean(0) - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 300))


def reachable(to, deadly, start):
    seen, queue = {start}, deque([start])
    while queue:
        for cell in to[:, queue.popleft()]:
            if int(cell) not in seen and not deadly[cell]:
                seen.add(int(cell))
                queue.append(int(cell))
    return seen


def test_the_lock_can_shut_a_goal_off_and_the_oracle_fetches_the_key():
    family = family_of("krazy_world", "env.energy=1000", "env.death=0", "env.ice=0", "env.teleporters=0", "env.episodes=1")
    tasks = sample(family, 200)
    returns, _, _ = oracle_episodes(family, tasks)
    shut = np.zeros(200, bool)
    for i in range(200):
        nothing = np.zeros(100, bool)
        goals = set(np.flatnonzero(tasks.tile[i] == GOAL))
        shut[i] = not goals <= reachable(tasks.leads[i, 0], nothing, int(tasks.start[i]))
        assert goals <= reachable(tasks.leads[i, 1], nothing, int(tasks.start[i]))
    assert shut.sum() > 20
    np.testing.assert_array_equal(returns, 3)


def test_oracle_and_chance_as_published():
    """A human earns 2.7 of 3 and chance 0.05 (Stadie et al. 2018); the oracle is greedy, and the numbers are near."""
    family = family_of("krazy_world", "env.episodes=1")
    tasks = sample(family, 200)
    returns, _, _ = oracle_episodes(family, tasks)
    assert 2.6 < returns.mean() < 2.95 and returns.max() == 3
    played = play(family, tasks, 12)  # no episode of chance is much longer
    first = np.cumsum(played.terminated, axis=1) - played.terminated == 0
    assert 0.02 < np.sum(played.reward * first) / 200 < 0.2


def test_a_new_episode_has_everything_back():
    family = family_of("krazy_world", "env.episodes=2")
    tasks = sample(family, 20)
    _, lengths, batch = oracle_episodes(family, tasks)
    for i in range(20):
        np.testing.assert_array_equal(batch.observation[i, 0], batch.observation[i, lengths[i, 0]])


def test_settings_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"env\.size=7.*room"):
        family_of("krazy_world", "env.size=7")
    small = family_of(
        "krazy_world", "env.size=5", "env.death=1", "env.ice=2", "env.energy_tiles=2", "env.goals=1", "env.lock=false"
    )
    tasks = sample(small, 50, "ood")
    np.testing.assert_array_equal(np.sum(tasks.tile == DEATH, axis=1), 2)
