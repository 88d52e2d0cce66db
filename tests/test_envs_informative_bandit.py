"""The bandit with an informative arm: nothing is random but the target, so plain numpy says every reward."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from trajectories import close, family_of, live, oracle, play, sample

from metarl_cli.core.types import InformativeArms


def test_splits():
    family, n = family_of("bandit_informative"), 5000
    assert family.prior == InformativeArms(arms=10, target=5.0, other=1.0)
    assert family.episodes == 5 and family.env.num_actions == 11
    for split, target in (("train", 5.0), ("test", 5.0), ("ood", 2.5)):
        reward = sample(family, n, split).reward
        index = reward[:, :10].argmax(1)
        np.testing.assert_allclose(np.bincount(index, minlength=10) / n, 0.1, atol=4 * np.sqrt(0.09 / n))
        np.testing.assert_allclose(reward[:, :10].max(1), target)
        np.testing.assert_allclose(np.sort(reward[:, :10], axis=1)[:, :9], 1)
        np.testing.assert_allclose(reward[:, 10], (index + 1) / 10, rtol=1e-6)
        # As the paper has it: at first the informative arm is worth 0.55, any other 1.4.
        assert close(reward[:, 10], 0.55)
        if target == 5:
            np.testing.assert_allclose(reward[:, :10].mean(1), 1.4, rtol=1e-6)


def test_against_plain_numpy():
    family = family_of("bandit_informative", "env.arms=4", "env.target=7.0", "env.other=-2.0")
    tasks = sample(family, 16)
    played = play(family, tasks, 100)
    assert not played.first.any() and not played.final.any() and not played.observation.any()
    assert played.truncated.all() and not played.terminated.any()
    assert set(np.unique(played.action)) == set(range(5))
    for i in range(16):
        target = round(4 * tasks.reward[i, 4]) - 1
        for action, reward in zip(played.action[i], played.reward[i], strict=True):
            expected = {target: 7.0, 4: (target + 1) / 4}.get(int(action), -2.0)
            assert abs(reward - expected) < 1e-6


def test_asking_first_is_worth_it():
    family = family_of("bandit_informative")
    tasks = sample(family, 2000)
    knows = live(family, tasks, oracle(family), ())
    np.testing.assert_allclose(knows.reward, 5)

    def act(task, target, observation, previous, key):
        asked = previous.action == 10
        target = jnp.where(asked, jnp.round(10 * previous.reward).astype(int) - 1, target)
        return target, jnp.where(previous.action < 0, 10, target), None

    asks = live(family, tasks, act, jnp.zeros((), int))
    np.testing.assert_allclose(asks.reward[:, 1:], 5)
    assert close(asks.reward.sum(1), 0.55 + 4 * 5)
