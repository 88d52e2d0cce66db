"""The water maze against plain numpy and known values."""

from __future__ import annotations

from math import hypot

import numpy as np
import pytest
from navigation import follow, oracle_episodes
from scipy import stats
from trajectories import family_of, one_task, sample

from metarl_cli.core.errors import ConfigError


class WatermazeReference:
    def __init__(self, task):
        self.platform = np.asarray(task.platform, np.float64)

    def reset(self, state):
        self.position = np.asarray(state.position, np.float64)
        assert tuple(self.position) in {(0, 1), (1, 0), (0, -1), (-1, 0)}
        return self.position

    def step(self, action):
        x, y = np.asarray(action, np.float64)
        if hypot(x, y) > 0.1:
            x, y = 0.1 * x / hypot(x, y), 0.1 * y / hypot(x, y)
        x, y = self.position[0] + x, self.position[1] + y
        if hypot(x, y) > 1:
            x, y = x / hypot(x, y), y / hypot(x, y)
        self.position = np.array([x, y])
        there = hypot(*(self.position - self.platform)) <= 0.1
        return self.position, float(there), there


@pytest.mark.parametrize("split", ["train", "ood"])
def test_against_plain_numpy(split):
    family = family_of("watermaze")
    rewards = follow(family, WatermazeReference, sample(family, 8, split), share=0.5, atol=2e-5)
    assert np.any(rewards == 1)
    rewards = follow(family, WatermazeReference, sample(family, 8, split), share=0.0, atol=2e-5)  # along the wall, too
    assert np.any(rewards == 0)


def test_oracle_swims_straight():
    family = family_of("watermaze")
    tasks = one_task(family, 1, platform=np.array([0.0, 0.0]))
    returns, lengths, _ = oracle_episodes(family, tasks)
    np.testing.assert_array_equal(returns, 1)
    assert np.all((lengths == 9) | (lengths == 10))  # 0.9 at 0.1 a step, up to rounding
    tasks = sample(family, 50)
    returns, lengths, batch = oracle_episodes(family, tasks)
    np.testing.assert_array_equal(returns, 1)
    way = (np.linalg.norm(batch.observation[:, 0] - tasks.platform, axis=1) - 0.1) / 0.1
    clear = np.abs(way - way.round()) > 1e-3
    np.testing.assert_array_equal(lengths[clear, 0], np.ceil(way[clear]))


def test_splits():
    family, n = family_of("watermaze"), 4000
    for split in family.splits:
        platform = sample(family, n, split).platform
        radius, angle = np.hypot(*platform.T), np.arctan2(*platform.T)
        assert stats.kstest(angle, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3
        low, high = (0.7, 0.9) if split == "ood" else (0, 0.7)
        assert stats.kstest(radius**2, stats.uniform(low**2, high**2 - low**2).cdf).pvalue > 1e-3
    with pytest.raises(ConfigError, match=r"env\.reach=0\.95.*0\.9"):
        family_of("watermaze", "env.reach=0.95")
