"""Correlated bandits against plain numpy and against the Bayes-optimal regret of Wang et al.'s distributions."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from trajectories import close, family_of, live, play, sample

from metarl_cli.core.types import CorrelatedArms

PRESETS = {"bandit_uniform": None, "bandit_easy": (0.1, 0.9), "bandit_medium": (0.25, 0.75), "bandit_hard": (0.4, 0.6)}


@pytest.mark.parametrize("name", PRESETS)
def test_splits(name):
    family, n = family_of(name), 4000
    assert family.prior == CorrelatedArms(PRESETS[name]) and family.episodes == 100 and family.env.num_actions == 2
    for split in ("train", "test"):
        p, other = sample(family, n, split).probability.T
        np.testing.assert_allclose(p + other, 1, rtol=1e-6)
        if PRESETS[name] is None:
            assert stats.kstest(p, "uniform").pvalue > 1e-3
        else:
            low, high = PRESETS[name]
            assert np.all(np.isclose(p, low) | np.isclose(p, high))
            assert close(np.isclose(p, high), 0.5)
    ood = sample(family, n, "ood").probability
    assert stats.kstest(ood.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(ood.T)[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize("name", PRESETS)
def test_against_plain_numpy(name):
    family, steps = family_of(name), 2000
    tasks = sample(family, 8)
    played = play(family, tasks, steps)
    assert not played.first.any() and not played.final.any() and not played.observation.any()
    assert played.truncated.all() and not played.terminated.any()  # a pull is an episode
    rng = np.random.default_rng(0)
    for i in range(8):
        p = tasks.probability[i, 0]
        for arm, pays in ((0, p), (1, 1 - p)):
            reward = played.reward[i][played.action[i] == arm]
            again = rng.random(reward.size) < pays
            assert set(np.unique(reward)) <= {0, 1}
            error = np.sqrt(2 * pays * (1 - pays) / reward.size)
            assert abs(reward.mean() - again.mean()) <= 4 * error + 1e-9


# Both arms tell the same of p: there is nothing to explore, and who always takes what looks best is optimal. Evidence is
# the number of successes of arm 1 and failures of arm 2, minus the others.
@pytest.mark.parametrize(("name", "regret"), [("bandit_uniform", 1.221), ("bandit_easy", 0.625), ("bandit_medium", 1.0)])
def test_bayes_optimal_regret(name, regret):
    family = family_of(name)

    def act(task, evidence, observation, previous, key):
        sign = (2 * previous.reward - 1) * (1 - 2 * previous.action)
        evidence = evidence + jnp.where(previous.action < 0, 0, sign)
        return evidence, (evidence < 0).astype(int), None

    batch = live(family, sample(family, 10_000), act, jnp.zeros(()))
    assert close(batch.regret.sum(1), regret)
