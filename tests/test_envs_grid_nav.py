"""GridNavi and the two Dark Rooms against plain numpy and known values."""

from __future__ import annotations

import numpy as np
import pytest
from navigation import follow, one_hot, oracle_episodes
from scipy import stats
from trajectories import family_of, sample

from metarl_cli.core.errors import ConfigError


class GridReference:
    """Left, right, up and down written out, as VariBAD's `state_transition` has them; stay is 0."""

    def __init__(self, task, size, start, off, on, once, coordinates):
        self.goal, self.moves = tuple(task.goal), [tuple(m) for m in task.moves]
        self.size, self.start, self.off, self.on, self.once, self.coordinates = size, start, off, on, once, coordinates

    def reset(self, state):
        self.x, self.y = self.start
        self.been = False
        return self.seen()

    def seen(self):
        return [self.x, self.y] if self.coordinates else one_hot((self.x, self.y), self.size)

    def step(self, action):
        standard = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]
        action = standard.index(self.moves[action])  # `ood` shuffles them
        if action == 1:
            self.y = min(self.y + 1, self.size - 1)
        elif action == 2:
            self.x = min(self.x + 1, self.size - 1)
        elif action == 3:
            self.y = max(self.y - 1, 0)
        elif action == 4:
            self.x = max(self.x - 1, 0)
        there = (self.x, self.y) == self.goal
        pays = there and not (self.once and self.been)
        self.been |= there
        return self.seen(), self.on if pays else self.off, False


NUMBERS = {
    "grid_nav": (5, (0, 0), -0.1, 1.0, False, True),
    "dark_room": (9, (4, 4), 0.0, 1.0, False, False),
    "dark_room_hard": (17, (8, 8), 0.0, 1.0, True, False),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("split", ["train", "ood"])
def test_against_plain_numpy(name, split):
    family = family_of(name)
    rewards = follow(family, lambda task: GridReference(task, *NUMBERS[name]), sample(family, 12, split))
    assert np.any(rewards == 1)


def all_goals(family):
    tasks = sample(family, len(family.prior.goals))
    return tasks.__class__(
        goal=np.array(family.prior.goals),
        moves=tasks.moves,
        reward=tasks.reward,
        max_steps_in_episode=tasks.max_steps_in_episode,
    )


def test_grid_nav_oracle_and_goals():
    family = family_of("grid_nav")
    # As VariBAD lists them: all but the start and the three beside it.
    goals = {(x, y) for x in range(5) for y in range(5)} - {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert family.prior.size == 5 and family.prior.start == (0, 0)
    assert set(family.prior.goals) == goals and len(family.prior.goals) == 21
    assert family.horizon == 15 and family.episodes == 4
    returns, lengths, _ = oracle_episodes(family, all_goals(family))
    distance = np.array(family.prior.goals).sum(1)
    # d - 1 steps of -0.1 and 16 - d of 1.
    np.testing.assert_allclose(returns, np.broadcast_to((16.1 - 1.1 * distance)[:, None], (21, 4)), rtol=1e-5)
    np.testing.assert_allclose(returns.mean(), 11.0714, atol=1e-4)
    assert np.all(lengths == 15)


def test_dark_room_oracle():
    # 21 - d steps on a goal at distance d, 20 where one starts on it; the distances of 81 cells from the middle sum to 360.
    family = family_of("dark_room")
    returns, _, _ = oracle_episodes(family, all_goals(family))
    distance = np.abs(np.array(family.prior.goals) - 4).sum(1)
    assert len(distance) == 81
    np.testing.assert_allclose(returns, np.broadcast_to(np.minimum(21 - distance, 20)[:, None], returns.shape))
    assert returns.mean() == pytest.approx((80 * 21 - 360 + 20) / 81)
    family = family_of("dark_room_hard")
    returns, _, _ = oracle_episodes(family, sample(family, 50))
    np.testing.assert_array_equal(returns, 1)


@pytest.mark.parametrize("name", NUMBERS)
def test_splits(name):
    family, n = family_of(name), 6000
    standard = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]
    for split in family.splits:
        tasks = sample(family, n, split)
        goals, counts = np.unique(tasks.goal, axis=0, return_counts=True)
        assert {tuple(g) for g in goals} == set(family.prior.goals)
        assert stats.chisquare(counts).pvalue > 1e-3
        orders, counts = np.unique(tasks.moves.reshape(n, 10), axis=0, return_counts=True)
        if split == "ood":
            assert len(orders) == 120 and stats.chisquare(counts).pvalue > 1e-3
        else:
            np.testing.assert_array_equal(orders, np.reshape(standard, (1, 10)))


def test_settings():
    family = family_of("grid_nav", "env.size=3", "env.start=center", "env.clearance=1", "env.observation=one_hot")
    edge = tuple((x, y) for x in range(3) for y in range(3) if (x, y) != (1, 1))
    assert (family.prior.size, family.prior.start, family.prior.goals) == (3, (1, 1), edge)
    with pytest.raises(ConfigError, match=r"env\.clearance=5.*env\.size=5"):
        family_of("grid_nav", "env.clearance=5")
