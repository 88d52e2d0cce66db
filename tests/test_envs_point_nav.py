"""The presets of point_nav against plain numpy, one function per published environment, and known values."""

from __future__ import annotations

from math import cos, hypot, pi, sin

import jax
import numpy as np
import pytest
from navigation import follow, oracle_episodes
from scipy import stats
from trajectories import family_of, one_task, sample

from metarl_cli.core.errors import ConfigError

CORNERS = [np.array(corner) for corner in ((-2, -2), (2, -2), (-2, 2), (2, 2))]


def maml(before, after, goal):
    return -hypot(*(after - goal))


def pearl(before, after, goal):
    """`sparsify_rewards` of the dense one, and 1 more within the radius."""
    dense = -hypot(*(after - goal))
    return dense + 1 if dense >= -0.2 else 0


def borel(before, after, goal):
    return 1 if -hypot(*(after - goal)) >= -0.2 else 0


def corner(before, after, goal):
    if np.abs(after).sum() < 0.5:
        return 0
    if hypot(*(after - goal)) == min(hypot(*(after - c)) for c in CORNERS):
        return hypot(*(before - goal)) - hypot(*(after - goal))
    return 0


def momentum(before, after, goal):
    return max(2 - hypot(*(after - goal)), 0)


# name: reward, largest action, whether the velocity stays, half-width of the box that ends an episode
PUBLISHED = {
    "point_nav": (maml, 0.1, False, 0.01),
    "point_nav_sparse": (pearl, 0.1, False, 0),
    "point_nav_sparse_dorfman": (borel, 0.1, False, 0),
    "point_nav_corner": (corner, 0.2, False, 0),
    "point_nav_wind": (maml, 0.1, False, 0),
    "point_nav_momentum": (momentum, 0.1, True, 0),
}


class PointNavReference:
    def __init__(self, task, reward, largest, glides, box):
        self.goal, self.wind = np.asarray(task.goal, np.float64), np.asarray(task.wind, np.float64)
        self.reward, self.largest, self.glides, self.box = reward, largest, glides, box

    def reset(self, state):
        self.position, self.velocity = np.asarray(state.position, np.float64), np.asarray(state.velocity, np.float64)
        return self.seen()

    def step(self, action):
        before = self.position
        self.velocity = self.velocity * self.glides + np.clip(np.asarray(action, np.float64), -self.largest, self.largest)
        self.position = before + self.velocity + self.wind
        ended = bool(np.all(np.abs(self.position - self.goal) < self.box))
        return self.seen(), self.reward(before, self.position, self.goal), ended

    def seen(self):
        return [*self.position, *self.velocity] if self.glides else self.position


@pytest.mark.parametrize("name", PUBLISHED)
def test_against_plain_numpy(name):
    family = family_of(name)
    rewards = follow(family, lambda task: PointNavReference(task, *PUBLISHED[name]), sample(family, 6), atol=2e-5)
    assert len(np.unique(rewards)) > 10 or name == "point_nav_sparse_dorfman"
    assert np.any(rewards > 0) or PUBLISHED[name][0] is maml


def test_starts():
    """ProMP starts within 0.2 per axis, with momentum at a speed of up to 0.1; all others at the origin, at rest."""
    for name in PUBLISHED:
        family, n = family_of(name), 2000
        task = family.sample(jax.random.key(0))
        _, state = jax.vmap(lambda key: family.env.reset(key, task))(jax.random.split(jax.random.key(1), n))  # noqa: B023
        for values, width in (
            (state.position, 0.2 if name in ("point_nav_corner", "point_nav_momentum") else 0),
            (state.velocity, 0.1 if name == "point_nav_momentum" else 0),
        ):
            if width:
                assert stats.kstest(np.ravel(values), stats.uniform(-width, 2 * width).cdf).pvalue > 1e-3
            else:
                np.testing.assert_array_equal(values, 0)


def test_goals_and_winds_of_all_splits():
    n = 4000
    for name in ("point_nav_sparse", "point_nav_sparse_dorfman"):
        for split, half in (("train", 0), ("test", 0), ("ood", pi)):
            tasks = sample(family_of(name), n, split)
            np.testing.assert_allclose(np.hypot(*tasks.goal.T), 1, rtol=1e-5)
            angle = np.arctan2(*tasks.goal.T[::-1]) % (2 * pi)
            assert stats.kstest(angle, stats.uniform(half, pi).cdf).pvalue > 1e-3
            np.testing.assert_array_equal(tasks.wind, 0)
    for name in ("point_nav_corner", "point_nav_momentum"):
        for split, far in (("train", 2), ("test", 2), ("ood", 3)):
            goals, counts = np.unique(sample(family_of(name), n, split).goal, axis=0, return_counts=True)
            np.testing.assert_allclose(goals, [(-far, -far), (-far, far), (far, -far), (far, far)])
            assert stats.chisquare(counts).pvalue > 1e-3
    family = family_of("point_nav_wind")
    for split in ("train", "test", "ood"):
        tasks = sample(family, n, split)
        np.testing.assert_array_equal(tasks.goal, np.broadcast_to([1.0, 0.0], (n, 2)))
        largest = np.abs(tasks.wind).max(1)
        if split == "ood":
            assert largest.min() >= 0.05 and largest.max() <= 0.075 + 1e-6
        else:
            assert stats.kstest(tasks.wind.ravel(), stats.uniform(-0.05, 0.1).cdf).pvalue > 1e-3


def test_published_goals_of_pearl():
    """20 of 100 points, equally spaced on the half circle, shuffled by numpy's legacy generator."""
    np.random.seed(1337)
    angles = np.linspace(0, np.pi, num=100)
    goals = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    np.random.shuffle(goals)
    family = family_of("point_nav_sparse")
    np.testing.assert_allclose(family.fixed("test").goal, goals[80:], atol=1e-6)
    assert family.fixed("train") is None and family_of("point_nav_sparse_dorfman").fixed("test") is None


def test_oracles_in_known_places():
    # PEARL: from the origin to (0, 1) at 0.1 a step. Within 0.2 after 8 steps, at 0.2, 0.1, 0: 1 - 0.2 + 1 - 0.1 + 11 * 1.
    family = family_of("point_nav_sparse")
    tasks = one_task(family, 1, goal=np.array([0.0, 0.9999]))
    assert oracle_episodes(family, tasks)[0] == pytest.approx(0.8 + 0.9 + 11, abs=1e-3)
    # Dorfman: 1 from the 8th of 60 steps on.
    family = family_of("point_nav_sparse_dorfman")
    tasks = one_task(family, 1, goal=np.array([0.0, 0.9999]))
    np.testing.assert_allclose(oracle_episodes(family, tasks)[0], 53)
    # Wind: to (1, 0) at 0.1 - 0.05 against the wind; 19 steps still away, then there.
    family = family_of("point_nav_wind")
    tasks = one_task(family, 1, wind=np.array([-0.05, 0.03]))
    np.testing.assert_allclose(oracle_episodes(family, tasks)[0], -sum(1 - 0.05 * i for i in range(1, 20)), rtol=1e-5)
    # Corners: what is paid is the way from where |x| + |y| >= 0.5 to the corner.
    family = family_of("point_nav_corner")
    returns, _, batch = oracle_episodes(family, sample(family, 20))
    assert np.all((returns > hypot(2, 2) - 1) & (returns < hypot(1.75, 1.75) + 0.3)) and np.all(batch.valid)


def test_the_oracle_with_momentum_arrives_and_stays():
    family = family_of("point_nav_momentum")
    tasks = sample(family, 20)
    _, _, batch = oracle_episodes(family, tasks)
    late = (np.arange(batch.reward.shape[1]) % 100) > 40
    np.testing.assert_allclose(batch.reward[:, late], 2, atol=1e-4)
    np.testing.assert_allclose(batch.observation[:, late, 2:], 0, atol=1e-3)


def test_settings_that_do_not_fit():
    for changes, word in (
        (["env.radius=0.1"], "env.reward=distance needs 0"),
        (["env.reward=near"], "needs one above 0"),
        (["env.goals=half_circle"], "env.goals=square env.size=0.5"),
        (["env.wind=0.1"], "env.published=null"),
    ):
        with pytest.raises(ConfigError, match=word):
            family_of("point_nav", *changes)


def test_the_half_circle_is_the_upper_one():
    goals = sample(family_of("point_nav_sparse"), 100).goal
    assert np.all(goals[:, 1] >= 0) and np.any(goals[:, 0] < cos(3)) and np.any(goals[:, 1] > sin(1.4))
